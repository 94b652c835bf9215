"""Makes the quickstart's model and data: `python make_model.py --out DIR [--seed 0]`, about a minute on two cores.

Writes DIR/model (HF format, bf16), DIR/data/train.jsonl, DIR/data/heldout.jsonl and, last of all, DIR/made.json.
A DIR whose made.json matches the seed and these sources is left as it is; anything less is made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

SOURCES = ("arithmetic.py", "characters.py", "pretrain.py", "make_model.py")
NUM_THREADS = 2


def identity(seed: int) -> dict[str, object]:
    """What decides the result: the seed and the sources that make it."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES))
    return {"seed": seed, "sources_sha256": digest.hexdigest()}


def is_made(out: Path, seed: int) -> bool:
    """Whether `out` holds the finished result of this seed and these sources."""
    record = out / "made.json"
    if not record.exists():
        return False
    made = json.loads(record.read_text())
    return {key: made.get(key) for key in identity(seed)} == identity(seed)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, seed: int) -> dict[str, float]:
    """Make everything in the empty `folder`; returns what was measured."""
    # On busy cores, threads that spin at OpenMP's barriers make a step a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    from arithmetic import ledger, split_questions
    from characters import build_tokenizer
    from pretrain import Recipe, accuracy, build_model, pretrain
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(seed)
    recipe = Recipe()
    split = split_questions(seed)
    write_rows(folder / "data" / "train.jsonl", [s.row for s in split.train])
    write_rows(folder / "data" / "heldout.jsonl", [s.row for s in split.heldout])
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"pre-training {model.num_parameters() / 1e6:.2f} M parameters on the careless clerk's ledger", flush=True)
    entries = ledger(split, recipe.num_steps * recipe.batch_size, seed)
    pretrain(model, tokenizer, entries, recipe, say=lambda line: print(line, flush=True))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    return {"heldout_accuracy": accuracy(saved, tokenizer, split.heldout, num_samples=8)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and data/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the ledger and the weights (default 0)")
    args = parser.parse_args()
    out: Path = args.out
    if is_made(out, args.seed):
        print(f"{out} is complete: nothing to make")
        return
    started = time.monotonic()
    made = identity(args.seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "made.json").unlink(missing_ok=True)
    for unfinished in out.glob(".making-*"):
        shutil.rmtree(unfinished)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as temporary:
        folder = Path(temporary)
        measured = make(folder, args.seed)
        for name in ("data", "model"):
            if (out / name).exists():
                shutil.rmtree(out / name)
            os.rename(folder / name, out / name)
        (folder / "made.json").write_text(json.dumps(made | measured, indent=2) + "\n")
        os.rename(folder / "made.json", out / "made.json")
    print(f"made {out} in {time.monotonic() - started:.0f} s")
    print(
        f"held-out accuracy before reinforcement learning, sampled at temperature 1: {measured['heldout_accuracy']:.3f}"
    )


if __name__ == "__main__":
    main()
