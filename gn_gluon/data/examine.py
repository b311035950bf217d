"""What becomes of one image file when it is packed: kept as it is, encoded anew, or left out; and what to say of it."""
import io
import os
import tempfile
import time

import cv2
import numpy as np
import PIL.Image

from gn_gluon.errors import UserError

#: An orientation in EXIF is ignored here as in training and evaluation.
DECODE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
#: Reads every code of a JPEG image, where damage shows, but makes one pixel of 64: in half of the time.
CHECK = cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION
#: Of images that are encoded anew only because readers do not take what they are.
QUALITY = 95

#: Kinds of notes that name their image...
LEFT_OUT, CONVERTED, WARNED = NAMED = ('left_out', 'converted', 'warned')
#: ...and those that are only counted: nothing is the matter with such images.
GRAYSCALE, ORIENTED, OTHER_FORMAT, RESIZED = COUNTED = ('grayscale', 'exif_orientation', 'other_format', 'resized')

#: Words of libjpeg where pixels are made up for lost ones. It warns of less as well, as bytes that do not belong.
_LOST = ('premature end', 'bad huffman code', 'found marker')


class Complaints:
    """What decoders write to the process's standard error, which leads here from now on.

    That is where libjpeg says that it makes up pixels; no function returns it.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        os.dup2(self.file.fileno(), 2)

    def take(self):
        """The text since the last call, on one line."""
        length = os.lseek(2, 0, os.SEEK_CUR)
        if not length:
            return ''
        text = os.pread(2, length, 0).decode('utf-8', 'replace')
        os.lseek(2, 0, os.SEEK_SET)
        os.ftruncate(2, 0)
        return ' '.join(text.split())


def decode(data, complaints, flags=DECODE):
    """An encoded image as training decodes it: ((H, W, 3) uint8 BGR or None, what the decoder complains of)."""
    complaints.take()  # what others may have written meanwhile
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # as for more pixels than OpenCV takes
        image = None
    return image, complaints.take()


def lost_pixels(complaint):
    """Whether a decoder's complaint is of pixels that it had to make up."""
    return any(words in complaint.lower() for words in _LOST)


def examine(name, data, complaints, resize=None, quality=QUALITY):
    """What to pack for one file.

    Arguments:
        name: of the file.
        data: its bytes (any buffer).
        complaints: the process's Complaints.
        resize: longest allowed shorter side in pixels; larger images are reduced to it (the mean of areas), never is
            one enlarged. None: all keep their size, and their bytes where those are a JPEG that readers take.
        quality: of the JPEG images that are made, 1 to 100.
    Returns (`data` itself, new bytes of a JPEG image, or None for one that is left out; list of (kind, text); seconds
    that decoding took).
    """
    if not len(data):
        return None, [(LEFT_OUT, 'empty file')], 0.0
    components, exif = jpeg_header(data)
    readable = components in (1, 3)
    began = time.perf_counter()
    image, complaint = decode(data, complaints, CHECK if readable and resize is None else DECODE)
    seconds = time.perf_counter() - began
    if image is None:
        return None, [(LEFT_OUT, _why(data))], seconds
    if lost_pixels(complaint):
        return None, [(LEFT_OUT, f'damaged: {complaint}')], seconds
    notes = [(WARNED, complaint)] if complaint else []
    if components is None:
        found = _format(data)
        disguised = name.lower().endswith(('.jpeg', '.jpg'))
        notes.append((CONVERTED, f'{found} by content') if disguised else (OTHER_FORMAT, found))
    elif components == 1:
        notes.append((GRAYSCALE, ''))
    elif not readable:
        notes.append((CONVERTED, 'CMYK' if components == 4 else f'{components} components'))
    if exif is not None and _orientation(exif) in range(2, 9):
        notes.append((ORIENTED, ''))
    height, width = image.shape[:2]
    short = min(height, width)
    if resize is not None and short > resize:
        size = tuple(round(side * resize / short) for side in (width, height))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        notes.append((RESIZED, ''))
    elif readable:
        return data, notes, seconds
    done, encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise UserError(f'{name}, {width} x {height} pixels, cannot be encoded as a JPEG image; remove it')
    return encoded.tobytes(), notes, seconds


def jpeg_header(data):
    """(number of colour components, bytes of the EXIF segment or None) of a JPEG image; (None, None) of another."""
    if bytes(data[:3]) != b'\xff\xd8\xff':
        return None, None
    exif, place = None, 2
    while place + 10 <= len(data) and data[place] == 0xff:
        marker = data[place + 1]
        if marker == 0xff or 0xd0 <= marker <= 0xd8 or marker == 1:  # filling, or a marker without content
            place += 1 if marker == 0xff else 2
            continue
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):  # the start of a frame
            return data[place + 9], exif
        end = place + 2 + (data[place + 2] << 8 | data[place + 3])
        if marker == 0xe1 and exif is None and bytes(data[place + 4:place + 10]) == b'Exif\0\0':
            exif = bytes(data[place + 4:end])
        place = end
    return None, None


def _orientation(exif):
    found = PIL.Image.Exif()
    try:
        found.load(exif)
        return found.get(0x0112)
    except Exception:  # damaged metadata raises nearly anything
        return None


def _format(data):
    try:
        return PIL.Image.open(io.BytesIO(data)).format
    except Exception:  # OpenCV knows formats that Pillow does not
        return 'no JPEG'


def _why(data):
    """Why OpenCV decodes nothing, in words."""
    try:
        opened = PIL.Image.open(io.BytesIO(data))
    except Exception:
        return 'not an image'
    try:
        opened.load()
    except Exception as error:
        return f'damaged {opened.format}: {error}'
    return f'{opened.format} that OpenCV does not decode'
