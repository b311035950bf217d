"""What a run says of itself: the console table, metrics.jsonl, steps.jsonl and percentiles.jsonl, TensorBoard."""
import contextlib
import json
import os
import sys
import time

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from gn_gluon.checkpoint import write_text
from gn_gluon.errors import UserError

_COLUMNS = ['epoch', 'learning rate', 'train loss', 'train err %', 'val loss', 'val err %', 'top-5 err %', 'images/s',
            'wait %', 'epoch s']
_STEPS_PER_EPOCH = 500


class RunLog:
    """The files of a run folder that grow while it trains, and the table on the console.

    Arguments:
        folder: the run folder.
        num_epochs, steps_per_epoch: for the progress bar and the table.
        epoch, num_updates: where the run starts; rows of a later epoch or update, left by a run that was cut off
            after its last checkpoint, are dropped.
    """

    def __init__(self, folder, num_epochs, steps_per_epoch, epoch=0, num_updates=0):
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self._every = max(1, steps_per_epoch // _STEPS_PER_EPOCH)
        metrics, steps = os.path.join(folder, 'metrics.jsonl'), os.path.join(folder, 'steps.jsonl')
        _keep(metrics, lambda row: row['epoch'] < epoch)
        _keep(steps, lambda row: row['update'] <= num_updates)
        self._percentiles = os.path.join(folder, 'percentiles.jsonl')
        # A run that starts over measures before its first update again.
        _keep(self._percentiles, lambda row: num_updates > 0 and row['update'] <= num_updates)
        try:
            self._metrics = open(metrics, 'a')
            self._steps = open(steps, 'a')
            # Its thread dies on a full disk: with a bounded queue the run would then wait for it for ever.
            self._board = SummaryWriter(os.path.join(folder, 'tensorboard'), purge_step=num_updates + 1, max_queue=0)
        except OSError as error:
            raise UserError(f'cannot write in {folder}: {error.strerror}') from None
        self._bar = None

    def table_head(self):
        """Print the names of the table's columns."""
        print('  '.join(name.rjust(max(7, len(name))) for name in _COLUMNS))

    def start_epoch(self, epoch, step):
        """Start a progress bar, or plain lines now and then where there is no terminal."""
        self._epoch = epoch
        self._told_at = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.steps_per_epoch, initial=step, unit='update', leave=False,
                             desc=f'epoch {epoch + 1}/{self.num_epochs}')

    def step(self, num_updates, step, loss, learning_rate):
        """One update was made: number `num_updates` of the run, `step` of the epoch (both count from 1)."""
        if num_updates % self._every == 0:
            _append(self._steps, {'update': num_updates, 'epoch': self._epoch, 'loss': loss,
                                  'learning_rate': learning_rate})
            self._board.add_scalar('step/loss', loss, num_updates)
            self._board.add_scalar('step/learning_rate', learning_rate, num_updates)
        if self._bar is not None:
            self._bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
            self._bar.update()
        elif time.monotonic() - self._told_at > 30:
            self._told_at = time.monotonic()
            print(f'epoch {self._epoch + 1}/{self.num_epochs}: update {step} of {self.steps_per_epoch}, loss '
                  f'{loss:.3f}', flush=True)

    def percentiles(self, num_updates, row):
        """Write what Percentiles measured after so many updates of the run."""
        try:
            with open(self._percentiles, 'a') as file:
                _append(file, {'update': num_updates, 'epoch': num_updates / self.steps_per_epoch, **row})
        except OSError as error:
            raise UserError(f'cannot write {self._percentiles}: {error.strerror}') from None

    def images(self, images):
        """Show training images (n, C, H, W) as the network sees them, stretched to the full range."""
        images = images[:, :3 if images.shape[1] >= 3 else 1]
        low, high = images.min(), images.max()
        self._board.add_images('train_images', np.uint8(255 * (images - low) / max(high - low, 1e-6)), 0)

    def end_epoch(self, epoch, num_updates, train, validation, learning_rate, seconds, validation_seconds, wait_seconds,
                  peak_memory, weights_sha256):
        """Write the rows of a finished epoch and print its line of the table.

        Arguments:
            train, validation: Metrics.
            seconds, validation_seconds, wait_seconds: of training in this epoch, of evaluating, and of waiting for
                data while training.
            peak_memory: bytes.
            weights_sha256: of all weights, see distributed.weights_digest.
        """
        self.close_bar()
        trained = train.num_samples / seconds
        common = {'epoch': epoch, 'learning_rate': learning_rate}
        for split, metrics, extra in (
                ('train', train, {'images_per_second': trained, 'seconds': seconds, 'peak_memory_bytes': peak_memory,
                                  'data_wait_share': wait_seconds / seconds, 'weights_sha256': weights_sha256}),
                ('validation', validation, {'images_per_second': validation.num_samples / validation_seconds,
                                            'seconds': validation_seconds})):
            row = dict(common, split=split, loss=metrics.loss, top1_error=metrics.top1_error,
                       top5_error=metrics.top5_error, num_samples=metrics.num_samples, **extra)
            _append(self._metrics, row)
            for name in ('loss', 'top1_error', 'top5_error', 'images_per_second'):
                self._board.add_scalar(f'{split}/{name}', row[name], num_updates)
        self._board.add_scalar('train/learning_rate', learning_rate, num_updates)
        with contextlib.suppress(OSError):
            self._board.flush()
        cells = [f'{epoch + 1}/{self.num_epochs}', f'{learning_rate:.5g}',
                 f'{train.loss:.4f}', f'{train.top1_error:.2f}', f'{validation.loss:.4f}',
                 f'{validation.top1_error:.2f}', f'{validation.top5_error:.2f}',
                 f'{trained:.0f}', f'{100 * wait_seconds / seconds:.1f}',
                 f'{seconds + validation_seconds:.1f}']
        print('  '.join(cell.rjust(max(7, len(name))) for cell, name in zip(cells, _COLUMNS)), flush=True)

    def close_bar(self):
        """Take the progress bar off the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self):
        """Close the files."""
        self.close_bar()
        for file in (self._metrics, self._steps, self._board):
            # A row that a full disk refused is tried once more here; the failure has been reported.
            with contextlib.suppress(OSError):
                file.close()


class NoLog:
    """The log of a rank whose run rank 0 writes down: takes everything, and says nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def read_rows(path):
    """The objects of a .jsonl file; a last line that a kill cut short is left out. Empty when there is no file."""
    rows = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
    return rows


def _keep(path, wanted):
    if os.path.exists(path):
        write_text(path, ''.join(json.dumps(row) + '\n' for row in read_rows(path) if wanted(row)))


def _append(file, row):
    try:
        file.write(json.dumps(row) + '\n')
        file.flush()
    except OSError as error:
        raise UserError(f'cannot write {file.name}: {error.strerror}; the last checkpoint is kept') from None
