"""Exact counts of what a network got right."""
import statistics

import numpy as np


class Metrics:
    """Counts over any number of batches: loss, top-1 and top-5 error.

    Attributes: num_samples, top1_wrong, top5_wrong (int), loss_sum (float, cross entropy in nats).
    """

    def __init__(self, num_samples=0, top1_wrong=0, top5_wrong=0, loss_sum=0.0):
        self.num_samples = num_samples
        self.top1_wrong = top1_wrong
        self.top5_wrong = top5_wrong
        self.loss_sum = loss_sum

    def add(self, logits, labels):
        """Count one batch. logits: (n, num_classes), labels: (n,).

        Ties count as argmax would break them: the class with the smaller index comes first.
        """
        logits = np.asarray(logits, np.float64)
        labels = np.asarray(labels, np.int64)
        rows = np.arange(len(labels))
        largest = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
        loss = (log_sum - logits[rows, labels]).sum()
        chosen = logits[rows, labels][:, None]
        before = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > chosen) | ((logits == chosen) & before)).sum(axis=1)
        # A logit that is not a number ranks nowhere: it is wrong, not right by default.
        rank = np.where(np.isfinite(chosen[:, 0]), rank, logits.shape[1] + 5)
        self.num_samples += len(labels)
        self.top1_wrong += int((rank >= 1).sum())
        self.top5_wrong += int((rank >= 5).sum())
        self.loss_sum += float(loss)

    def merge(self, other):
        """Count what another Metrics has counted."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    @property
    def loss(self):
        """Mean cross entropy, nats per image."""
        return self.loss_sum / self.num_samples

    @property
    def top1_error(self):
        """Percent of the images whose class is not the first choice."""
        return 100.0 * self.top1_wrong / self.num_samples

    @property
    def top5_error(self):
        """Percent of the images whose class is not among the first five."""
        return 100.0 * self.top5_wrong / self.num_samples

    def state_dict(self):
        """The counts, as the constructor takes them."""
        return dict(vars(self))


def headline(rows, last=5):
    """The figure that runs are compared by: the median error of the last epochs, five in the paper (Section 4.1).

    Arguments:
        rows: of metrics.jsonl.
        last: so many epochs, or as many as are finished.
    Returns a dict: top1_error and top5_error in percent, epochs (the number that the median is of), last_epoch (how
    many are finished), num_samples. None when no epoch is finished.
    """
    rows = [row for row in rows if row['split'] == 'validation']
    if not rows:
        return None
    chosen = rows[-last:]
    return {'top1_error': statistics.median(row['top1_error'] for row in chosen),
            'top5_error': statistics.median(row['top5_error'] for row in chosen),
            'epochs': len(chosen), 'last_epoch': rows[-1]['epoch'] + 1, 'num_samples': rows[-1]['num_samples']}
