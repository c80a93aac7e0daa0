"""Loggers that keep what they are given."""

from pytorch_lightning.loggers.logger import DummyLogger


class Record(DummyLogger):
    """Rows of what was logged at a time, without the epoch."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})

    def rows_with(self, name):
        return [row for row in self.rows if name in row]

    def columns(self, *names):
        """Return all that was logged under these names, a list for each."""
        return [[row[name] for row in self.rows_with(name)] for name in names]

    def names(self):
        return {name for row in self.rows for name in row}
