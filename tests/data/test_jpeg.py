"""Cuts give the pixels of a whole decode, which are Pillow's; broken bytes never do any harm."""

import functools
import importlib.util
import io
import os
import pathlib
import shutil
import struct
import subprocess
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import matplotlib
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mobilevit_jax.data import jpeg
from mobilevit_jax.data.record import DataError

PHOTO = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (8, 8), (9, 8), (4, 17), (16, 16), (17, 33), (33, 17)]
needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not installed (libjpeg-turbo-progs)"
)


@functools.cache
def photo(height: int = 203, width: int = 170) -> Image.Image:
    """A photograph with grain, which no decoder smooths away."""
    with Image.open(PHOTO) as image:
        small = np.asarray(image.convert("RGB").crop((60, 20, 400, 426)).resize((width, height)))
    grain = np.random.default_rng(0).normal(0, 8, small.shape)
    return Image.fromarray((small + grain).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 90, "subsampling": 2} | options))
    return file.getvalue()


def encode_sampled(image: Image.Image, sampling: str) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, "RGB", sampling)


def with_exif(image: Image.Image) -> bytes:
    """Rotated by EXIF, with a whole JPEG, end marker and all, as the thumbnail."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, exif=exif.tobytes() + encode(image.resize((40, 50))))


def extended(data: bytes) -> bytes:
    """Called extended sequential (SOF1), which may have more tables but here has not."""
    return data.replace(b"\xff\xc0", b"\xff\xc1", 1)


def by_jpegtran(data: bytes, *arguments: str | pathlib.Path) -> bytes:
    return subprocess.run(["jpegtran", *arguments], input=data, capture_output=True).stdout


def without_jfif(data: bytes) -> bytes:
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + (data[4] << 8 | data[5]) :]


def crop(height: int, width: int) -> Image.Image:
    return photo().crop((30, 30, 30 + width, 30 + height))


def grey() -> Image.Image:
    return photo().convert("L")


KINDS: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: encode(photo()),
    "4:2:2": lambda: encode(photo(), subsampling=1),
    "4:4:4": lambda: encode(photo(), subsampling=0),
    "4:4:0": lambda: encode_sampled(photo(), "440"),
    "4:1:1": lambda: encode_sampled(photo(), "411"),
    "grey": lambda: encode(grey()),
    "Adobe RGB": lambda: encode(photo(), keep_rgb=True, subsampling=0),
    "optimised": lambda: encode(photo(), optimize=True, quality=97),
    "coarse": lambda: encode(photo(), quality=5),
    "progressive": lambda: encode(photo(), progressive=True),
    "progressive 4:4:4": lambda: encode(photo(), progressive=True, subsampling=0, quality=95),
    "progressive grey": lambda: encode(grey(), progressive=True),
    "rotated by EXIF": lambda: with_exif(photo()),
    "restart each row": lambda: encode(photo(), restart_marker_rows=1),
    "restart every 7 blocks": lambda: encode(photo(), restart_marker_blocks=7),
    "progressive with restarts": lambda: encode(photo(), restart_marker_blocks=3, progressive=True),
    "comment": lambda: encode(photo(), comment=b"x" * 5000),
    "zeros at its end": lambda: encode(photo()) + bytes(1000),
    "a second JPEG at its end": lambda: encode(photo()) + encode(crop(50, 60)),
    "extended": lambda: extended(encode(photo())),
    "no JFIF": lambda: without_jfif(encode(photo())),
    "a photograph": PHOTO.read_bytes,
}
for size in SIZES:
    name = f"{size[0]}x{size[1]}"
    KINDS[f"4:2:0 {name}"] = lambda size=size: encode(crop(*size))
    KINDS[f"4:2:2 {name}"] = lambda size=size: encode(crop(*size), subsampling=1)
    KINDS[f"4:4:0 {name}"] = lambda size=size: encode_sampled(crop(*size), "440")
    KINDS[f"4:4:4 {name}"] = lambda size=size: encode(crop(*size), subsampling=0)
# The last MCU 1 to 9 columns wide, where libjpeg changes its way of upsampling. It is a segment of
# its own, because 11 is a prime.
for width in range(161, 170):
    KINDS[f"4:2:0 40x{width}"] = lambda width=width: encode(photo(40, width))
    KINDS[f"4:2:2 40x{width}"] = lambda width=width: encode(photo(40, width), subsampling=1)
if (spec := importlib.util.find_spec("sklearn")) and spec.origin:  # two photographs of 427x640
    for path in sorted(pathlib.Path(spec.origin).parent.glob("datasets/images/*.jpg")):
        KINDS[path.name] = path.read_bytes


@functools.cache
def file_of(kind: str) -> bytes:
    return KINDS[kind]()


@functools.cache
def packed(kind: str) -> bytes:
    return jpeg.add_restart_markers(file_of(kind))


def header_of(data: bytes) -> jpeg.Header:
    header = jpeg.read_header(data)
    assert header is not None
    return header


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def halved_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (max(image.width // 2, 1), max(image.height // 2, 1)))
        return np.asarray(image.convert("RGB"))


def boxes(height: int, width: int, *, least: int, count: int, seed: int = 0) -> list:
    """The whole, corners, borders, sides at every place in an MCU, then random ones."""
    a, b = min(height, 7), min(width, 9)
    found = [(0, 0, height, width), (0, 0, a, b), (height - a, width - b, a, b)]
    found += [(0, width - b, height, b), (height - a, 0, a, width)]
    found += [(height - least, width - least, least, least), (0, 0, least, least)]
    for side in range(least, min(height, width, 34)):
        found += [(0, 0, side, side), (height - side, width - side, side, side)]
    rng = np.random.default_rng(seed)
    for _ in range(count):
        h, w = rng.integers(least, [height + 1, width + 1]).tolist()
        top, left = rng.integers(0, [height - h + 1, width - w + 1]).tolist()
        found.append((top, left, h, w))
    return found


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_tells_size_and_structure(kind: str):
    data = file_of(kind)
    header = header_of(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (header.width, header.height) == image.size
    assert header.sequential == ("progressive" not in kind)
    assert struct.unpack_from(">HH", data, header.size_at) == header[:2]
    assert header.tables == ()


def test_a_header_of_each_subsampling():
    units = {"4:2:0": (16, 16), "4:2:2": (8, 16), "4:4:0": (16, 8), "4:4:4": (8, 8)}
    for kind, unit in {**units, "4:1:1": (8, 32), "grey": (8, 8), "Adobe RGB": (8, 8)}.items():
        assert header_of(file_of(kind)).unit == unit, kind
    assert header_of(file_of("restart every 7 blocks")).restart == 7


@pytest.mark.parametrize("kind", ["4:2:0 17x33", "progressive", "rotated by EXIF", "4:4:4 33x17"])
def test_no_header_of_a_file_cut_anywhere(kind: str):
    data = file_of(kind)
    assert all(jpeg.read_header(data[:end]) is None for end in range(len(data)))


def test_no_header_of_what_is_not_a_common_jpeg():
    data = file_of("4:2:0")
    frame = header_of(data).size_at - 5  # the marker's 0xFF

    def patched(at: int, *values: int) -> bytes:
        return data[:at] + bytes(values) + data[at + len(values) :]

    png = io.BytesIO()
    photo().save(png, "PNG")
    others = {
        "PNG": png.getvalue(),
        "CMYK": encode(photo().convert("CMYK")),
        "empty": b"",
        "two bytes": b"\xff\xd8",
        "end at once": b"\xff\xd8\xff\xd9",
        "12 bits": patched(frame + 4, 12),
        "lossless": patched(frame + 1, 0xC3),
        "arithmetic": patched(frame + 1, 0xC9),
        "no height": patched(frame + 5, 0, 0),
        "no width": patched(frame + 7, 0, 0),
        "two channels": patched(frame + 9, 2),
        "luma 3 wide": patched(frame + 11, 0x31),
        "chroma as fine as luma": patched(frame + 14, 0x22),
        "a frame too long": patched(frame + 3, 18),
        "two frames": data[:frame] + data[frame : frame + 19] + data[frame:],
        "no frame": data[:frame] + data[frame + 19 :],
        "a segment without length": data[:2] + b"\xff\xe1\0\1" + data[2:],
        "two pictures begun": data[:2] + data,
        "bytes between segments": data[:2] + b"x" + data[2:],
    }
    for name, other in others.items():
        assert jpeg.read_header(other) is None, name


# Decoding


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_pillow(kind: str):
    data = file_of(kind)
    image = jpeg.decode(data, header_of(data))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, by_pillow(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_cut_from_the_whole_picture(kind: str):
    check_boxes(file_of(kind))


@needs_jpegtran
@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_cut_between_restart_markers(kind: str):
    data = packed(kind)
    header = header_of(data)
    assert header.tables
    np.testing.assert_array_equal(jpeg.decode(data, header), by_pillow(file_of(kind)))
    np.testing.assert_array_equal(by_pillow(data), by_pillow(file_of(kind)))
    check_boxes(data, restart_cut=True)


def check_boxes(data: bytes, *, restart_cut: bool = False) -> None:
    header = header_of(data)
    whole, halved = by_pillow(data), halved_by_pillow(data)
    count = 40 if header.height * header.width < 100_000 else 6
    for box in boxes(header.height, header.width, least=1, count=count):
        top, left, height, width = box
        image = jpeg.decode_box(data, header, box)
        np.testing.assert_array_equal(
            image, whole[top : top + height, left : left + width], str(box)
        )
        if restart_cut:
            check_piece(data, header, box)
    if min(header.height, header.width) < 2:
        return
    for box in boxes(header.height, header.width, least=2, count=count, seed=1):
        top, left, height, width = (side // 2 for side in box)
        image = jpeg.decode_box(data, header, box, halve=True)
        expected = halved[top : top + height, left : left + width]
        np.testing.assert_array_equal(image, expected, str(box))


def check_piece(data: bytes, header: jpeg.Header, box: tuple[int, int, int, int]) -> None:
    """The fast way was taken, and libjpeg finds nothing to say about the piece."""
    cut = jpeg._restart_cut(data, header, box, 2)
    assert cut is not None
    simplejpeg.decode_jpeg(cut[0], strict=True)
    step = header.restart * header.unit[1]
    assert cut[3] < box[2] + 2 * header.unit[0] + 4
    assert cut[4] < box[3] + 2 * step + 16


def test_half_size_is_the_mean_of_four():
    data = file_of("4:4:4")
    header = header_of(data)
    halved = jpeg.decode_box(data, header, (2, 4, 200, 160), halve=True)
    whole = jpeg.decode(data, header)[2:202, 4:164].astype(float)
    means = whole.reshape(100, 2, 80, 2, 3).mean(axis=(1, 3))
    assert halved.shape == (100, 80, 3)
    assert abs(halved - means).mean() < 1


@needs_jpegtran
def test_channels_in_scans_of_their_own_are_decoded_whole(tmp_path: pathlib.Path):
    script = tmp_path / "scans"
    script.write_text("0; 1; 2;")
    data = by_jpegtran(file_of("4:2:0"), "-scans", script)
    assert not header_of(data).sequential
    np.testing.assert_array_equal(by_pillow(data), by_pillow(file_of("4:2:0")))
    check_boxes(data)
    check_boxes(jpeg.add_restart_markers(data), restart_cut=True)


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (200, 0, 4, 5), (0, 166, 5, 5)],
)
def test_a_box_outside_is_refused(box: tuple[int, int, int, int]):
    data = file_of("4:2:0")
    with pytest.raises(ValueError, match="box"):
        jpeg.decode_box(data, header_of(data), box)


def test_half_of_one_pixel_is_refused():
    data = file_of("4:2:0")
    with pytest.raises(ValueError, match="empty"):
        jpeg.decode_box(data, header_of(data), (0, 0, 1, 9), halve=True)


def test_a_hundred_scans_are_refused():
    data = file_of("progressive")
    last = data.rindex(b"\xff\xda")
    data = data[:last] + data[last:-2] * 100 + data[-2:]
    header = header_of(data)
    with pytest.raises(ValueError, match="scans"):
        jpeg.decode(data, header)
    with pytest.raises(ValueError, match="scans"):
        jpeg.decode_box(data, header, (0, 0, 9, 9))


def test_an_error_that_follows_a_warning_is_no_picture():
    """`simplejpeg.decode_jpeg(strict=False)` lets it pass, with whatever was in memory."""
    data = bytearray(file_of("4:2:0"))
    header = header_of(bytes(data))
    data[header.scan_at - 3] = 1  # the first coefficient of the scan: a warning
    data[header.scan_at - 4] = 0x33  # a Huffman table that is not there
    with pytest.raises(ValueError, match="table"):
        jpeg.decode(bytes(data), header)
    with pytest.raises(ValueError, match="table"):
        jpeg.decode_box(bytes(data), header, (0, 0, 50, 50))


@pytest.mark.parametrize("kind", ["progressive", "progressive grey"])
def test_a_progressive_file_with_its_middle_gone_is_grey_only_where_pillow_has_it_so(kind: str):
    data = file_of(kind)
    refused = 0
    for end in range(header_of(data).scan_at, len(data), 301):
        cut = data[:end] + b"\xff\xd9"
        try:
            image = jpeg.decode(cut, header_of(cut))
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(image, by_pillow(cut))
    assert refused > 20


def test_damaged_image_data_are_decoded_as_by_pillow():
    data = file_of("4:2:0")
    damaged = data[:5000] + bytes(200) + data[5200:]
    header = header_of(damaged)
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(damaged)
    whole = by_pillow(damaged)
    np.testing.assert_array_equal(jpeg.decode(damaged, header), whole)
    image = jpeg.decode_box(damaged, header, (40, 50, 60, 70))
    np.testing.assert_array_equal(image, whole[40:100, 50:120])


# Restart markers


@needs_jpegtran
def test_restart_markers_leave_a_plain_file():
    data = packed("4:2:0")
    assert data[6:10] == b"JFIF"
    assert len(data) < 1.03 * len(file_of("4:2:0"))
    header = header_of(data)
    assert (header.sequential, header.restart) == (True, 1)  # 11 MCUs a row, a prime
    assert jpeg.add_restart_markers(data) == data


@needs_jpegtran
@pytest.mark.parametrize(
    ("kind", "width", "restart"),
    [("4:2:0", 500, 4), ("4:2:0", 320, 5), ("4:4:4", 512, 8), ("grey", 88, 11), ("4:1:1", 256, 2)],
)
def test_segments_are_about_80_or_64_pixels_wide(kind: str, width: int, restart: int):
    image = photo(16, width)
    if kind == "grey":
        data = encode(image.convert("L"))
    else:
        data = encode_sampled(image, kind.replace(":", ""))
    assert header_of(jpeg.add_restart_markers(data)).restart == restart


@needs_jpegtran
def test_a_table_longer_than_one_segment_holds():
    image = photo().resize((8 * 181, 8 * 190)).convert("L").convert("RGB")
    data = jpeg.add_restart_markers(encode(image, quality=30, subsampling=0))
    header = header_of(data)
    assert header.restart == 1 and len(header.tables) == 2
    whole = jpeg.decode(data, header)
    for box in [(700, 700, 64, 32), (1500, 1400, 20, 48)]:
        top, left, height, width = box
        check_piece(data, header, box)
        image = jpeg.decode_box(data, header, box)
        np.testing.assert_array_equal(image, whole[top : top + height, left : left + width])


@needs_jpegtran
def test_a_table_that_does_not_fit_is_ignored():
    data = packed("4:2:0")
    header = header_of(data)
    ((start, stop),) = header.tables
    box = (40, 50, 60, 70)
    whole = by_pillow(data)
    other = jpeg.add_restart_markers(encode(photo().rotate(180)))
    assert header_of(other).tables == header.tables
    lengths = np.frombuffer(data[start:stop], "<u2")
    swapped = lengths.copy()
    swapped[[60, 61]] += np.array([1, 0xFFFF], np.uint16)  # and back
    shifted = np.roll(lengths, 3)
    tables = {
        "of another file": other[start:stop],
        "one byte off": swapped.tobytes(),
        "shifted": shifted.tobytes(),
        "all zero": bytes(stop - start),
        "too long": b"\xff" * (stop - start),
    }
    files = {name: data[:start] + table + data[stop:] for name, table in tables.items()}
    # The table of one file before the data of another, as `jpegtran -copy all` leaves it.
    files["without restarts"] = by_jpegtran(data, "-copy", "all")
    files["other restarts"] = by_jpegtran(data, "-copy", "all", "-restart", "2B")
    files["turned"] = by_jpegtran(data, "-copy", "all", "-rotate", "180", "-restart", "1B")
    size = struct.pack(">H", stop - start + 8)
    files["short"] = data[: start - 10] + size + data[start - 8 : stop - 2] + data[stop:]
    for name, file in files.items():
        header = header_of(file)
        assert not header.tables or jpeg._restart_cut(file, header, box, 2) is None, name
        expected = by_pillow(file) if name == "turned" else whole
        np.testing.assert_array_equal(
            jpeg.decode_box(file, header, box), expected[40:100, 50:120], name
        )


@needs_jpegtran
@pytest.mark.parametrize("number", range(8))
def test_damage_under_the_box_is_met_as_without_a_table(number: int):
    data = packed("4:2:0")
    header = header_of(data)
    ((start, stop),) = header.tables
    lengths = np.frombuffer(data[start:stop], "<u2").astype(int)
    at = header.scan_at + lengths[:60].sum() + lengths[60] // 2
    data = data[:at] + bytes([0xFF, 0xD0 + number]) + data[at + 2 :]
    image = jpeg.decode_box(data, header, (60, 50, 60, 70))
    np.testing.assert_array_equal(image, by_pillow(data)[60:120, 50:120])


def test_without_jpegtran_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="apt-get install libjpeg-turbo-progs") as error:
        jpeg.add_restart_markers(file_of("4:2:0 16x16"))
    assert "\n" not in str(error.value)


@needs_jpegtran
def test_what_cannot_be_repacked_is_refused():
    data = file_of("4:2:0")
    damaged = data[:3000] + bytes(300) + data[3300:]
    for bad in (b"", data[:-500], encode(photo().convert("CMYK")), damaged):
        with pytest.raises(ValueError) as error:
            jpeg.add_restart_markers(bad)
        assert "\n" not in str(error.value)


# Broken bytes

PIXELS = 1_000_000  # a caller looks at the header's size before it decodes


@functools.cache
def victims() -> list[bytes]:
    image = photo().crop((30, 30, 110, 90))
    files = [
        encode(image),
        encode(image, subsampling=0),
        encode(image.convert("L")),
        encode(image, progressive=True),
        encode(image, restart_marker_blocks=2),
    ]
    if shutil.which("jpegtran"):
        files += [jpeg.add_restart_markers(file) for file in files[:4]]
    return files


def mutated(data: bytes, program: bytes) -> bytes:
    """Every four bytes are one mutation: what, where (two bytes), how much."""
    for what, at, value in struct.iter_unpack(">BHB", program[: len(program) // 4 * 4]):
        at %= min(len(data), 800 if what & 8 else 65536) + 1  # half of them in the header
        before, after = data[:at], data[at:]
        match what & 7:
            case 0:  # cut short, but with an end marker
                data = before + data[-2:]
            case 1:
                data = before + program + after
            case 2:
                data = before + after[value:]
            case 3:
                data = before + bytes(len(after[:value])) + after[value:]
            case 4:  # segments and markers come twice
                data = before + data[3 * value : 3 * value + 100] + after
            case 5:  # becomes a marker
                data = before + bytes([0xFF, value]) + after[2:]
            case 6:
                data = before + bytes([value]) + after[1:]
            case _ if after:
                data = before + bytes([after[0] ^ value]) + after[1:]
    return data


def survive(data: bytes, place: bytes) -> None:
    """Whatever the bytes: ValueError, or pixels of the right shape and Pillow's where it has any.

    Without a table a box has the pixels of the whole. With one, damage may lie outside the box.
    """
    header = jpeg.read_header(data)
    if header is None or header.height * header.width > PIXELS:
        return
    try:
        whole = jpeg.decode(data, header)
    except ValueError:
        whole = None
    else:
        assert whole.shape == (header.height, header.width, 3)
        try:
            expected = by_pillow(data)
        except Exception:  # Pillow refuses in many ways
            expected = whole
        np.testing.assert_array_equal(whole, expected)
    y, x, tall, wide = (byte / 255 for byte in place)
    height, width = max(1, int(tall * header.height)), max(1, int(wide * header.width))
    top, left = int(y * (header.height - height)), int(x * (header.width - width))
    box = (top, left, height, width)
    try:
        image = jpeg.decode_box(data, header, box)
    except ValueError:
        pass
    else:
        assert image.shape == (height, width, 3)
        if whole is not None and not header.tables:
            np.testing.assert_array_equal(image, whole[top : top + height, left : left + width])
    if min(height, width) >= 2:
        try:
            image = jpeg.decode_box(data, header, box, halve=True)
        except ValueError:
            pass
        else:
            assert image.shape == (height // 2, width // 2, 3)


def fuzz(*, cases: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None)
    @hypothesis.given(
        st.sampled_from(victims()),
        st.binary(min_size=4, max_size=16),
        st.binary(min_size=4, max_size=4),
    )
    def run(victim: bytes, program: bytes, place: bytes) -> None:
        survive(mutated(victim, program), place)

    run()


def test_broken_bytes_do_no_harm(capfd: pytest.CaptureFixture):
    fuzz(cases=2000, seed=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_broken_bytes_do_no_harm_and_leave_no_memory_behind(capfd: pytest.CaptureFixture):
    resident = []
    for seed in range(50):
        fuzz(cases=2000, seed=seed)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert capfd.readouterr() == ("", "")
    assert resident[-1] - resident[4] < 20, resident  # MiB, over 90,000 cases
