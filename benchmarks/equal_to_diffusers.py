"""Check that our training step computes the same numbers as diffusers' example script, on a CPU in fp32.

    python -m benchmarks.equal_to_diffusers --script train_dreambooth_lora_sdxl.py

The script's own `main` makes one optimizer step on a tiny SDXL, with hooks around the library calls that it and we both
make. Our code gets the same model and pictures, and the random values of that step: latents, noise and timesteps. It
computes all else itself, from the pictures to the LoRA's gradients. The script also needs torchvision.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from demo.making import build_model
from lace_lora.config import Config
from lace_lora.pictures.crops import Cropping
from lace_lora.sdxl import lora_weights, models, prompts
from lace_lora.training import batches, latents
from lace_lora.training.loss import training_loss

RESOLUTION, RANK, SEED = 256, 4, 1
INSTANCE_PROMPT, CLASS_PROMPT = "a photo of <myspecialstyle>", "a photo of a painting"
# Of a quantity's largest value. Two orders of the same fp32 operations differ by 1e-7 to 1e-6; a wrong one by far more.
TOLERANCE = 1e-5
HOOKED = (
    (AutoencoderKL, "encode"), (UNet2DConditionModel, "add_adapter"), (UNet2DConditionModel, "forward"),
    (DDPMScheduler, "add_noise"), (Tensor, "backward"),
)  # fmt: skip
DRAWN = ("latents", "noise", "timesteps")  # random in the script's step, and given to ours


class Case(NamedTuple):
    name: str
    options: tuple[str, ...] = ()  # the script's
    size: int = 8  # instance pictures, all in one batch
    snr_gamma: float | None = None
    prior_loss_weight: float | None = None


PRIOR = ("--with_prior_preservation", "--prior_loss_weight=0.7")
CASES = (
    Case("plain"),
    Case("min-SNR, gamma 5", ("--snr_gamma=5",), snr_gamma=5.0),
    # One picture: with more, the script gives instances the class prompt.
    Case("prior preservation", PRIOR, size=1, prior_loss_weight=0.7),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--script", required=True, type=Path, help="diffusers' train_dreambooth_lora_sdxl.py")
    parser.add_argument("--model", type=Path, help="SDXL in diffusers format; if not given, a tiny one is built")
    parser.add_argument("--pictures", type=Path, default=Path("demo/lace"), help="folder of JPEGs")
    arguments = parser.parse_args()
    models.prepare_process()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # where fp32 means fp32
    equal = True
    print("| case | quantity | largest absolute difference | largest relative difference | equal |")
    print("|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        model = arguments.model or Path(folder, "base")
        if not arguments.model:
            build_model.build(Path(folder), build_model.TINY)
        for case in CASES:
            pictures = copy_pictures(arguments.pictures, Path(folder, case.name), case)
            theirs = script_step(arguments.script, case, model, Path(folder, case.name))
            equal &= report(case, theirs, our_step(case, model, pictures, theirs))
    return 0 if equal else 1


def copy_pictures(source: Path, work: Path, case: Case) -> list[Path]:
    """Some pictures in a folder of their own, where the script finds nothing else; then the class's."""
    folders = ("instance", "class") if case.prior_loss_weight else ("instance",)
    for folder in folders:  # the same in both, since the script uses the instances' time ids for the class
        (work / folder).mkdir(parents=True)
    pictures = sorted(source.glob("*.jpg"))[: case.size]
    return [Path(shutil.copy(path, work / folder)) for folder in folders for path in pictures]


Step = dict[str, dict[str, Tensor]]  # a training step's quantities, each of one tensor (named "") or of many by name


@contextmanager
def watched_step() -> Iterator[Step]:
    """Copies what goes into and comes out of the `HOOKED` methods, which the script and our code both call."""
    step: Step = {}
    with ExitStack() as hooks:
        for kind, name in HOOKED:
            hooks.enter_context(patch.object(kind, name, followed(getattr(kind, name), step)))
        yield step


def followed(method: Callable[..., Any], step: Step) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if method.__name__ == "add_adapter":  # so that both sides start from the same LoRA
            torch.manual_seed(SEED)
        result = method(*args, **kwargs)
        record(step, method.__name__, result, *args, **kwargs)
        return result

    return call


def record(step: Step, method: str, output: Any, owner: Any, *inputs: Any, **options: Any) -> None:
    if method == "add_adapter":
        step["LoRA"] = {name: weight for name, weight in owner.named_parameters() if weight.requires_grad}
        for name, weight in step["LoRA"].items():
            if "lora_B" in name:  # zeros at first, with which lora_A has no gradient that could be compared
                torch.nn.init.normal_(weight, std=0.02)
        store(step, initial_LoRA=step["LoRA"])
    elif method == "encode":
        scale, posterior = owner.config.scaling_factor, output.latent_dist
        store(step, posterior_mean=posterior.mean * scale, posterior_std=posterior.std * scale)
    elif method == "add_noise":
        store(step, latents=inputs[0], noise=inputs[1], timesteps=inputs[2])
    elif method == "forward":
        store(step, noisy_latents=inputs[0], prompt_embeds=inputs[2], prediction=output[0])
        store(step, **options["added_cond_kwargs"])
    else:
        store(step, loss=owner, LoRA_gradients={name: weight.grad for name, weight in step["LoRA"].items()})


def store(step: Step, **quantities: Any) -> None:
    for quantity, value in quantities.items():
        tensors = value if isinstance(value, dict) else {"": value}
        step[quantity.replace("_", " ")] = {name: tensor.detach().clone() for name, tensor in tensors.items()}


def script_step(path: Path, case: Case, model: Path, work: Path) -> Step:
    """One optimizer step of the script's."""
    sys.path.insert(0, str(path.parent))
    script: Any = importlib.import_module(path.stem)
    options = [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={work / 'instance'}",
        f"--instance_prompt={INSTANCE_PROMPT}", f"--class_data_dir={work / 'class'}", f"--class_prompt={CLASS_PROMPT}",
        f"--num_class_images={case.size}", f"--output_dir={work / 'output'}", f"--resolution={RESOLUTION}",
        f"--rank={RANK}", f"--seed={SEED}", f"--train_batch_size={case.size}", "--max_train_steps=1", "--center_crop",
    ]  # fmt: skip
    script.args = script.parse_args([*options, *case.options])  # its dataset reads the global
    with watched_step() as seen:
        script.main(script.args)
    return seen


def our_step(case: Case, model: Path, pictures: list[Path], drawn: Step) -> Step:
    """The same step with our code, all of whose use is here, and with the random values of the script's step."""
    config, cpu = Config(pretrained_model=str(model), variant=None, rank=RANK), torch.device("cpu")
    contents = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures}
    load_vae = partial(models.load_vae, config, cpu, torch.float32)
    encoded = latents.encode_pictures(load_vae, contents, Cropping([(RESOLUTION, RESOLUTION)]))
    # The script shuffles: a row's picture is the one with the nearest latents.
    mean, std = torch.cat(encoded.mean), torch.cat(encoded.std)  # one version of each
    rows = torch.cdist(drawn["posterior mean"][""].flatten(1), mean.flatten(1)).argmin(dim=1)
    text_encoders = prompts.load_text_encoders(config, cpu, torch.float32)
    encode = partial(
        prompts.encode_prompts, tokenizers=prompts.load_tokenizers(str(model)), text_encoders=text_encoders
    )
    texts = ([INSTANCE_PROMPT] * case.size + [CLASS_PROMPT] * case.size)[: len(pictures)]
    unique, caption = batches.unique_captions(texts)
    embeddings = prompts.embed(unique, None, encode, zeros=True)
    prompt_embeds, pooled_prompt_embeds = embeddings.prompt_embeds, embeddings.pooled_prompt_embeds
    data = batches.Encoded(encoded, caption, prompt_embeds, pooled_prompt_embeds, instances=case.size)
    ours = batches.step_batch(data, SEED, 0, case.size, 1000, prior_weight=case.prior_loss_weight or 1.0)
    values = {name: drawn[name][""] for name in DRAWN} | {
        "time_ids": encoded.time_ids[rows],
        "caption": caption,
        "prompt_embeds": prompt_embeds[caption],
        "pooled_prompt_embeds": pooled_prompt_embeds[caption],
        "weights": ours.weights,
    }
    batch = batches.Batch(**{name: values[name] for name in batches.Batch.__annotations__})
    unet = models.load_unet(str(model), None, cpu, torch.float32)
    with watched_step() as seen:
        lora_weights.add_lora({"unet": unet}, config)
        training_loss(unet.train(), batch, models.load_noise_scheduler(config), case.snr_gamma).backward()
    store(seen, posterior_mean=mean[rows], posterior_std=std[rows])
    return {name: seen[name] for name in seen if name not in (*DRAWN, "LoRA")}


def report(case: Case, theirs: Step, ours: Step) -> bool:
    """Print a case's rows; returns whether all of them are equal."""
    loss, plain = theirs["loss"][""], (theirs["prediction"][""] - theirs["noise"][""]).pow(2).mean()
    print(f"{case.name}: loss {loss:.6f}, without weights {plain:.6f}", file=sys.stderr)
    # Min-SNR weights nothing where all timesteps are noisy, and would be equal however wrong.
    assert torch.isclose(loss, plain, rtol=1e-3) != bool(case.options), f"{case.name} tests nothing: change the seed"
    all_equal = True
    for quantity, tensors in ours.items():
        assert tensors.keys() == theirs[quantity].keys()
        pairs = [(theirs[quantity][name].double(), tensor.double()) for name, tensor in tensors.items()]
        absolute = torch.stack([(expected - actual.view_as(expected)).abs().max() for expected, actual in pairs])
        relative = (absolute / torch.stack([expected.abs().max() for expected, _ in pairs])).max().item()
        all_equal &= (equal := relative <= TOLERANCE)  # not where it is NaN
        print(f"| {case.name} | {quantity} | {absolute.max():.1e} | {relative:.1e} | {'yes' if equal else '**no**'} |")
    return all_equal


if __name__ == "__main__":
    sys.exit(main())
