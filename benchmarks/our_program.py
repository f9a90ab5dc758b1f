"""Our training program beside a peer's: `python -m benchmarks.our_program [OPTIONS] [TRAIN'S OWN]`.

It waits for its turn in its validations, while its clock stands, and starts from a peer's weights
where --weights names them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.peer_program import Turn
from benchmarks.peer_weights import our_weights
from speedrun import train


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turn", type=int, metavar="DESCRIPTOR")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a peer's state dict")
    train.add_arguments(parser)
    args = parser.parse_args()
    turn, validate, build_model = Turn(args.turn), train.validate, train.build_model

    def validate_and_wait(*inputs: Any) -> float:
        loss = validate(*inputs)
        turn.wait()
        return loss

    def build_from_weights(*inputs: Any) -> torch.nn.Module:
        model = build_model(*inputs)
        if args.weights is not None:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
            model.load_state_dict(our_weights(state, model.state_dict()))
        return model

    with (
        mock.patch.object(train, "validate", validate_and_wait),
        mock.patch.object(train, "build_model", build_from_weights),
    ):
        code = train.run(args)
    if torch.cuda.is_initialized():
        print(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
