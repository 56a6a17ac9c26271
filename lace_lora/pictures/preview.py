"""A sheet of the pictures as training crops them, so that one look tells what will be learnt."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from lace_lora.errors import DISK_OR_DRIVE, UserError
from lace_lora.files import write_atomically
from lace_lora.pictures import gallery, image_files, recipe

SIDE = 180  # pixels, of the longer side of a crop on the sheet


def write(path: Path, pictures: Sequence[Path], shapes: Sequence[tuple[int, int]], formats: Sequence[str]) -> None:
    """Write the sheet, with each picture's name below it.

    Args:
        path: a .png file.
        shapes: heights and widths that training crops to, see `image_files.crop_shapes`.
        formats: see `image_files.formats_of`.

    Raises:
        UserError: the file cannot be written (exit 4), or is one of the user's own; a picture has been changed.
    """

    def crop(picture: Path) -> Image.Image:
        opened, size = image_files.open_picture(picture, 2 * SIDE, formats)
        height, width = image_files.nearest_shape(size, shapes)
        scale = SIDE / max(height, width)
        return image_files.fit(opened, (round(height * scale), round(width * scale)))[0]

    try:
        if path.exists() and not recipe.is_drawn(path.read_bytes()):
            raise UserError(f"preview: {path} exists, and this program did not write it: choose another name")
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL
            crops = list(pool.map(crop, pictures))
        write_atomically(path, gallery.named_sheet(crops, [picture.name for picture in pictures]))
    except image_files.BROKEN as error:
        if not (isinstance(error, OSError) and error.errno):
            raise UserError(f"a picture can no longer be read ({error}): run the same command again") from error
        advice = "set it to a .png file that you can write"
        raise UserError(f"preview: cannot write {path} ({error.strerror}): {advice}", DISK_OR_DRIVE) from error
