"""modded-nanogpt's weights of record 89 under our names (RECIPE section 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class PeerWeightsError(ValueError):
    """The weights aren't of a model like ours. The message names what differs."""


def our_weights(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` for a model whose state dict has the names and shapes of `ours`, and its types.

    Their banks are padded, their small networks and factors stacked: what is beyond our shapes is
    left away, if it can't be reached by a token. PeerWeightsError where a name or shape is missing.
    """
    try:
        found = _by_our_names(theirs, {name: tensor.shape for name, tensor in ours.items()})
    except KeyError as missing:
        raise PeerWeightsError(
            f"the peer's model has no {missing.args[0]}: it isn't that of record 89"
        ) from None
    if set(found) != set(ours):
        different = sorted(set(found) ^ set(ours))
        raise PeerWeightsError(f"only one of both models has {', '.join(different)}")
    for name, tensor in found.items():
        if tensor.shape != ours[name].shape:
            raise PeerWeightsError(
                f"{name} is {tuple(ours[name].shape)} in ours, the peer's {tuple(tensor.shape)}"
            )
    return {name: tensor.to(ours[name].dtype) for name, tensor in found.items()}


def _by_our_names(p: Mapping[str, Tensor], shapes: Mapping[str, tuple]) -> dict[str, Tensor]:
    num_layers = len(p["resid_lambdas"])
    attention_lambdas = p["scalars"][: 2 * num_layers].view(num_layers, 2)
    smear, skip = p["scalars"][2 * num_layers :][:2]
    found = {
        "embed": p["embed.weight"],
        "lm_head": p["lm_head.weight"],
        "bigram_embed": p["bigram_embed.weight"],
        "sign_table": p["bigram_sign_table"],
        "value_embeds": p["value_embeds"].view(shapes["value_embeds"]),
        "w_smear": p["smear_gate.weight"].flatten(),
        "lambda_qkv": attention_lambdas[:, 0],
        "lambda_o": attention_lambdas[:, 1],
        "lambda_smear": smear,
        "lambda_skip": skip,
        "r_attn": p["resid_lambdas"][:, 0],
        "r_mlp": p["resid_lambdas"][:, 1],
        "p_attn": p["post_lambdas"][:, 0],
        "p_mlp": p["post_lambdas"][:, 1],
        "gate_s": p["_mudd_gate_scale"],
    }
    banks = {"qk_bank": p["qk_bank"], "vo_bank": p["vo_bank"]}
    banks |= {"mlp_bank": p["mlp_bank"].flatten(0, 1), "ve_gate": p["ve_gate_bank"]}
    for name, bank in banks.items():  # behind ours: padding, and the gate that MUDD's layer has
        found[name] = bank[: shapes[name][0]]
    nets = {"gate_pre": ("mudd_gate", 0), "gate_post": ("mudd_gate", 1)}
    nets |= {"mudd_layer": ("mudd", 0), "mudd_out": ("mudd", 1)}
    for name, (stack, index) in nets.items():
        num_outputs = shapes[f"{name}_c"][0]
        found[f"{name}_W1"] = p[f"{stack}_w1"][index]
        found[f"{name}_W2"] = p[f"{stack}_w2"][index, :num_outputs]
        found[f"{name}_c"] = p[f"{stack}_b2"][index, :num_outputs]
    return found
