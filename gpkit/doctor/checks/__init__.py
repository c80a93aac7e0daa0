"""What `gpkit.diagnose` looks for, one file a subject. A check is a function of a `Trial`."""
