"""What the cells of lace_lora.ipynb call: forms to a settings file, main.py on it, its results inline.

IPython is in every notebook, so nothing installs it.
"""

import base64
import html
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from IPython.display import HTML, FileLink, Image, display

from lace_lora import drive, files, machine
from lace_lora.cell import CellError, one_line, run_main, small_jpeg
from lace_lora.config import TRAINING, Config, dump_config, load_config, settings_that_affect
from lace_lora.errors import UserError
from lace_lora.sdxl import hub
from lace_lora.training import plan

QUALITIES = {"quick": (300, 512), "good": (1000, 512), "fine": (1500, 1024)}  # steps, resolution
NO_GPU = "no GPU: in Colab's menu choose Runtime → Change runtime type → T4 GPU, then run the cells again from the top"
PAGE_PIXELS = 12e6  # of all pictures on a page in a cell: some 5 MB, whatever their number
PROGRAM = "lace-lora-program"  # the folder that the first cell copies the program to, anew each time
_MARK = "# Written by the form of lace_lora.ipynb. If you edit it, the form leaves it alone. "
# Fields of the form, by what they set; all others are in more_settings.
_FIELDS = {
    "images_dir": "photos", "lora_output_dir": "results", "output_dir": "results", "instance_prompt": "word",
    "resolution": "quality", "max_train_steps": "quality", "validation_steps": "quality",
}  # fmt: skip
_EMBEDDED = re.compile(r"(?<=data:image/jpeg;base64,)[A-Za-z0-9+/=]+")


class Project:
    """A folder with settings, LoRA and pictures, and what the cells do with it.

    `settings.yaml` in it is what the first form says; `drawing.yaml` has the settings of the last drawing too.
    `main.py --config` takes either.
    """

    def __init__(
        self, results: str, photos: str, word: str, quality: str, more_settings: str = "", use_this_form: bool = False
    ) -> None:
        """The form's values; settings.yaml wins if a LoRA began with it or it was edited, unless `use_this_form`.

        Raises:
            CellError: a value is not valid, or there are no photos, no GPU, or a LoRA of other settings.
        """
        self.folder = _absolute("results", results)
        self.settings_file, self.drawing_file = self.folder / "settings.yaml", self.folder / "drawing.yaml"
        form, names = _read_form(self.folder, photos, word, quality, more_settings)
        with one_line():
            drive.ensure_mounted(form)
            saved = load_config(self.settings_file) if self.settings_file.exists() else None
            differ = _differences(saved or form, form)
            if saved and use_this_form:
                _check_same_training(saved, differ)
            keep = saved and not use_this_form and (Path(saved.lora_output_dir).exists() or self._is_edited())
            config = saved if saved and keep else form
            _check_machine(config)
            if not Path(config.images_dir).is_dir():
                raise CellError(f"there is no folder {config.images_dir}: put your photos there, or correct its name")
            if config is form:
                self.folder.mkdir(parents=True, exist_ok=True)
                _save(self.settings_file, form, names)
        fields = ", ".join(dict.fromkeys(_FIELDS.get(name, "more_settings") for name in differ))
        kept = f", used as they are (tick use_this_form to change them to this form's: {fields})"
        print(f"Settings in {self.settings_file}{kept if differ and config is saved else ''}:")
        print(self.settings_file.read_text(encoding="utf-8"), end="")

        if drive.in_colab() and not self._is_on_drive():
            print(f"Note: {self.folder} is not in your Drive; it is lost when the runtime ends.")

    def _is_edited(self) -> bool:
        text, _, digest = self.settings_file.read_text(encoding="utf-8").rpartition(_MARK)
        return digest.strip() != files.json_digest(text)

    def _is_on_drive(self) -> bool:
        return not {"MyDrive", "Shareddrives"}.isdisjoint(self.folder.parts)

    @property
    def config(self) -> Config:
        with one_line():
            return load_config(self.settings_file)

    def show_pictures(self) -> None:
        """Every picture as it will be cut, below a list of those that are not used; what the training will take."""
        with tempfile.TemporaryDirectory() as folder:
            sheet = Path(folder, "preview.png")
            try:
                run_main("train", self.settings_file, "--dry-run", f"preview={sheet}")
            finally:
                if sheet.exists():
                    display(Image(small_jpeg(sheet.read_bytes())))

    def train(self) -> None:
        """Train, or go on training; samples and loss curve are shown as they change."""
        folder = Path(self.config.lora_output_dir)
        run_main("train", self.settings_file, watch=[folder / "samples.png", folder / "loss.png"])

    def draw(self, prompts: str, number: int, strength: float, seed: int) -> None:
        """Draw pictures, or those still missing, and show their page; prompts are separated by `|`."""
        token = self.config.token
        given = [text.strip().replace("{word}", token) for text in re.split(r"[|\n]", prompts) if text.strip()]
        for prompt in given:
            if token not in prompt:
                print(f"Note: {prompt!r} does not contain {token}, so little of your style will show.")
        form = {"prompt": json.dumps(given, ensure_ascii=False) if given else "", "num_images": number}
        form |= {"lora_scale": strength, "seed": seed}
        config = _config(self.settings_file, [f"{name}={value}" for name, value in form.items()])
        with one_line():
            # In a file of its own: with another seed, the training would be another one.
            _save(self.drawing_file, config, _differences(Config(), config))
        lines = run_main("inference", self.drawing_file)
        page = next(line.partition(": ")[2] for line in reversed(lines) if line.startswith("gallery page: "))
        embedded = html.escape(_smaller_page(Path(page).read_text(encoding="utf-8")))
        # In a frame of its own: its style and keys concern nothing else in the notebook.
        frame = f'<iframe srcdoc="{embedded}" style="width: 100%; height: 900px; border: 0"></iframe>'
        display(HTML(f"<div>{frame}</div>"))

    def download(self) -> None:
        """LoRA and pictures as one zip file: by the browser in Colab, elsewhere as a link."""
        config, in_colab = self.config, drive.in_colab()
        lora, pictures = Path(config.lora_output_dir), Path(config.output_dir)
        if not config.lora_file.exists():
            raise CellError(f"there is no finished LoRA in {lora} yet: run the cell that trains")
        with one_line():
            runs = pictures.parent.glob(f"{pictures.name}*")  # each with other settings
            own = [path for path in runs if re.fullmatch(r"(-\d+)?", path.name.removeprefix(pictures.name))]
            place = Path(tempfile.gettempdir()) if in_colab else self.folder
            target = files.free_name(place, config.lora_name, ".zip")
            with zipfile.ZipFile(target, "w") as archive:
                archive.write(self.settings_file, self.settings_file.name)
                for file in [*(file for folder in [lora, *own] for file in folder.glob("[!.]*"))]:
                    if file.is_file():
                        archive.write(file, f"{file.parent.name}/{file.name}")
        print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")
        if in_colab:
            from google.colab import files as browser

            browser.download(str(target))
        else:
            display(FileLink(os.path.relpath(target)))

    def finish(self) -> None:
        """Wait until everything has reached Drive, which uploads in the background."""
        if drive.in_colab():
            from google.colab import drive as google_drive

            if not self._is_on_drive():
                raise CellError(f"{self.folder} is not in your Drive: download it with the cell above first")
            google_drive.flush_and_unmount()
        print(f"Everything is in {self.folder}. You can close the runtime.")


def _read_form(folder: Path, photos: str, word: str, quality: str, more: str) -> tuple[Config, list[str]]:
    """The settings of the first form, and the names of those that belong into the file."""
    token = word.strip(" <>")
    if not re.fullmatch(r"[\w-]+", token):
        advice = "use one made-up word of letters, digits, - and _, such as myspecialstyle"
        raise CellError(f"word is {word!r}: {advice}")
    if quality not in QUALITIES:
        raise CellError(f"quality is {quality!r}: choose one of {', '.join(QUALITIES)}")
    steps, resolution = QUALITIES[quality]
    form = {
        "images_dir": _absolute("photos", photos),
        "lora_output_dir": folder / "lora",
        "output_dir": folder / "pictures",
        "instance_prompt": f"a photo of <{token}>",
        "max_train_steps": steps,
        "resolution": resolution,
        "validation_steps": steps // 5,
    }
    # At a comma before the next key, since values may contain commas too; `key: value`, as messages have it, is fine.
    others = [text.strip() for text in re.split(r"[,\n](?=\s*\w+\s*[=:])", more) if text.strip()]
    others = [re.sub(r"^(\w+)\s*[=:]\s*", r"\1=", text) for text in others]
    config = _config(Path(os.devnull), [*(f"{name}={value}" for name, value in form.items()), *others])
    return config, list(dict.fromkeys([*form, *(text.partition("=")[0] for text in others)]))


def _absolute(name: str, folder: str) -> Path:
    if not folder.strip():
        raise CellError(f"{name} is empty: give a folder, such as /content/drive/MyDrive/{name}")
    path = Path(folder.strip()).expanduser()
    if "://" in folder:
        raise CellError(f"{name} is a link: give the folder's path, such as /content/drive/MyDrive/{name}")
    if not path.is_absolute():
        if not drive.in_colab():
            raise CellError(f"{name} is {folder!r}: give its whole path, which begins with /")
        parts = path.parts[1:] if path.parts[0] in ("My Drive", "MyDrive") else path.parts
        path = Path(Config().drive_mount_path, "MyDrive", *parts)
    if PROGRAM in path.parts:
        raise CellError(f"{name} is {path}, which is replaced with the program: choose a folder elsewhere")
    return path


def _config(file: Path, form: list[str]) -> Config:
    """A settings file with a form's `key=value` on top."""
    try:
        return load_config(file, form)
    except UserError as error:
        raise CellError(re.sub(r"^(.* and )?command line: ", "", str(error), flags=re.M)) from None


def _differences(one: Config, other: Config) -> list[str]:
    return [name for name, value in vars(one).items() if value != getattr(other, name)]


def _save(file: Path, config: Config, names: Sequence[str]) -> None:
    plain = yaml.safe_load(dump_config(config))
    kept = {name: plain[name] for name in names}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
    files.write_atomically(file, f"{text}{_MARK}{files.json_digest(text)}\n".encode())


def _check_same_training(saved: Config, differ: Sequence[str]) -> None:
    fixed = {*settings_that_affect(TRAINING), "instance_prompt"}.intersection(differ)
    if fixed and Path(saved.lora_output_dir).exists():
        was = ", ".join(f"{name} (was {getattr(saved, name)})" for name in sorted(fixed))
        raise CellError(f"the LoRA in {saved.lora_output_dir} has other settings, {was}: choose another results folder")


def _check_machine(config: Config) -> None:
    """Print what there is of GPU and disk; stop if there is no GPU for a model that needs one."""
    gpu, large = machine.find_gpu(), hub.is_full_size(config.pretrained_model)
    if large and config.device == "auto" and gpu is None and drive.in_colab():
        raise CellError(NO_GPU)
    hub.require_gpu(config, "training SDXL on a CPU takes days")
    print(f"GPU: {gpu.name}, {gpu.total:.1f} GiB" if gpu else "GPU: none")
    needed, free = plan.disk_space(config), files.free_space(Path(config.lora_output_dir))
    print(f"Disk: {free:.0f} GB free for results, about {needed:.1f} GB needed" + " (too little)" * (free < needed))
    if large:
        print(f"      {shutil.disk_usage(Path.home()).free / 1e9:.0f} GB free here, about 12 GB needed for the models")


def _smaller_page(page: str) -> str:
    """The gallery page with smaller pictures, and without the links to its files, which lead nowhere from here."""
    width = min(1024, int((PAGE_PIXELS / max(1, len(_EMBEDDED.findall(page)))) ** 0.5))
    page = _EMBEDDED.sub(lambda found: base64.b64encode(small_jpeg(base64.b64decode(found[0]), width)).decode(), page)
    return re.sub(r'<a href="[^"]*"><img', '<a href="about:srcdoc#"><img', page)
