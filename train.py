"""``python train.py model=mlp penalty=weight_grad_norm``; ``--help`` lists everything."""

from gpkit.app.cli import main

if __name__ == "__main__":
    main()
