"""Is the meta-gradient right? `python metaunlearn.py --check-gradient` asks it of its own model."""

import argparse
import copy
import itertools
from unittest import mock

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import metaunlearn as M  # on the path: the caller is metaunlearn.py in its folder, or pytest
from common import say
from data import simulated_requests


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient]).double()


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def shifted(h_phi, by):
    """A copy of h_phi whose parameters, as one vector, are moved by `by`."""
    moved = copy.deepcopy(h_phi)
    vector_to_parameters(parameters_to_vector(moved.parameters()).detach() + by, moved.parameters())
    return moved


def slope(along, step: float, h_phi, f, A, theta, S, eta) -> float:
    """The central difference of A along a direction of phi; the rest: as of meta_gradient.

    What is a constant for the gradient stays: the mAPs, and with --preset code the loss on D_v.
    """
    real, seen, values = M.auxiliary_loss, [], []

    def watched(L, mAP, args):
        seen.append((mAP, {"v": L["v"]} if args.preset == "code" and "v" in L else {}))
        return real(L, mAP, args)

    def held(L, mAP, args):
        mAP, v = next(constants)
        return real(L | v, mAP, args)

    for by, function in ((0.0, watched), (step, held), (-step, held)):
        constants = itertools.cycle(seen)
        with mock.patch.object(M, "auxiliary_loss", function):
            theta_u = M.unlearn(shifted(h_phi, by * along), f, theta, S, eta)
            values.append(A(theta_u).item())
    return (values[1] - values[2]) / (2 * step)


def check_gradient(model, data, split, args) -> dict:
    """Relative errors of the meta-gradient, printed and returned: 2 people, 16 images a set."""
    args = argparse.Namespace(**vars(args) | {"amp": False, "meta_batch_size": 8})  # 2 parts a set
    support, forget = next(simulated_requests(data, split, 2, args.seed, 0))
    retain = split["retain"][:: len(split["retain"]) // 16 or 1][:16]
    split = split | {"val": split["val"][:16], "retain": retain, "forget": []}
    sets = M.request_sets(split, support, forget[:16], args, np.random.default_rng(args.seed))
    S = M.support_batch(data, split["train_ids"], support)
    original = M.original_outputs(model, data, split, args)
    fisher = M.fisher_of(model, data, split, args)
    h_phi = M.new_meta_loss(model, data, split, args, fisher).eval()
    # Away from the zero initialisation, where half of the gradient vanishes.
    torch.nn.init.normal_(h_phi.mlp[-2].weight, std=0.1)

    def request(dtype, amp=False):
        """The arguments of meta_gradient, in one precision."""
        m, h, (loss, mAP) = copy.deepcopy(model).to(dtype), copy.deepcopy(h_phi), original["v0"]
        known = {"logits": original["logits"].to(dtype), "v0": (loss.to(dtype), mAP)}
        f_S, theta = M.f_and_theta(m, argparse.Namespace(preset=args.preset, amp=amp))
        f = M.model_function(m, amp)

        def A(theta_u):
            return M.auxiliary(f, theta_u, sets, data, known, args)

        return h.to(dtype), f_S, A, theta, S, args.eta

    wide = request(torch.float64)
    exact, double = (flat(way(*wide)[1]) for way in (M.meta_gradient, M.meta_gradient_double))
    single, bf16 = (flat(M.meta_gradient(*request(torch.float32, amp))[1]) for amp in (False, True))
    norm = exact.norm()  # the slope in the gradient's own direction, where rounding matters least
    central = slope(exact / norm, 1e-5, *wide)
    errors = {"forward against double backward, float64": relative(exact, double)}
    errors["forward against central differences, float64"] = abs(1 - norm.item() / central)
    errors["float32 against float64"] = relative(single, exact)
    errors["bf16 autocast against float64"] = relative(bf16, exact)
    for name, error in errors.items():
        say(f"meta-gradient, relative error of {name}: {error:.1e}")
    return errors
