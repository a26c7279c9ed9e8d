"""The commands of ``tdlib``. Nothing here imports torch before a command runs, so that help stays fast."""
