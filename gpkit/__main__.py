"""``python -m gpkit``, the command ``gpkit-train``."""

from gpkit.app.cli import main

if __name__ == "__main__":
    main()
