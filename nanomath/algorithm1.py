"""Algorithm 1 of DeepSeekMath on one page: GRPO as the paper writes it, in plain loops.

For each question q a group of G outputs is sampled, each gets a reward, and

    A_i = (r_i - mean(r)) / std(r)                                      Sec. 4.1.2

    J = mean over questions and outputs of 1/|o_i| sum_t { min(rho A, clip(rho, 1-eps, 1+eps) A)
                                                           - beta D_KL(pi || pi_ref) }     Eq. 3
    rho = pi / pi_old;   D_KL is estimated by pi_ref/pi - log(pi_ref/pi) - 1               Eq. 4

is climbed: no value model, no rows of different length in one batch, one output at a time.
train_grpo.py does the same with everything a real run needs, and tests/test_scripts.py holds the
weights of the two to each other. See it learn to count from random weights, in under a minute:

    python -m nanomath.algorithm1

Next: kernels/reference.py, the same formulas as functions with their derivatives.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from nanomath.data import epoch_order
from nanomath.model import ModelConfig, Transformer
from nanomath.sampler import sample_groups

BETAS, MAX_GRAD_NORM = (0.9, 0.95), 1.0  # of AdamW; the paper gives pretraining's alone


def logprobs(model: Transformer, prompt: list[int], output: list[int], temperature: float):
    """Return log pi(o_t | q, o_<t) of every token of an output, [T]."""
    logits_TV = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0]


def train(
    policy: Transformer,
    prompts: Sequence[list[int]],
    reward: Callable[[int, list[int]], float],  # of the question with this index, and an output
    *,
    eos_ids: Sequence[int],
    num_iterations: int = 1,  # I
    num_steps: int = 144,  # M
    batch_size: int = 16,  # questions a step, P
    group_size: int = 64,  # G
    num_updates: int = 1,  # mu
    max_new_tokens: int = 1024,
    vocab_limit: int | None = None,
    temperature: float = 1.0,
    lr: float = 1e-6,
    clip_eps: float = 0.2,
    kl_coef: float = 0.04,  # beta
    seed: int = 0,
) -> Iterator[float]:
    """Train the policy in place by Algorithm 1; yield the mean reward of each step. Sec. 4.2's
    settings are the defaults."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)
    for step in range(num_iterations * num_steps):
        if step % num_steps == 0:
            reference = copy.deepcopy(policy)  # Alg. 1 l.3
        chosen = epoch_order(len(prompts), step, batch_size, seed)  # l.5
        rollouts = sample_groups(  # l.6 and 7: the policy is the old policy
            policy, [prompts[i] for i in chosen], group_size, eos_ids=eos_ids, seed=seed, step=step,
            max_new_tokens=max_new_tokens, temperature=temperature, vocab_limit=vocab_limit,
        )  # fmt: skip
        batch, all_rewards = [], []
        for p, index in enumerate(chosen):
            rows = zip(rollouts.tokens_PGT[p].tolist(), rollouts.lengths_PG[p].tolist())
            outputs = [tokens[:length] for tokens, length in rows]
            rewards = [float(reward(index, output)) for output in outputs]  # l.8
            rewards_G = torch.tensor(rewards, dtype=torch.float64)
            all_rewards += rewards
            centred_G = rewards_G - rewards_G.mean()  # l.9
            constant = rewards_G.max() - rewards_G.min() <= 1e-9 * rewards_G.abs().max()
            advantages_G = 0 * centred_G if constant else centred_G / rewards_G.std(correction=0)
            for output, advantage in zip(outputs, advantages_G.tolist()):
                with torch.no_grad():
                    old_T = logprobs(policy, prompts[index], output, temperature)
                    ref_T = logprobs(reference, prompts[index], output, temperature)
                batch.append((prompts[index], output, advantage, old_T, ref_T))
        for _ in range(num_updates):  # l.10
            optimizer.zero_grad()
            for prompt, output, advantage, old_T, ref_T in batch:
                logp_T = logprobs(policy, prompt, output, temperature)
                ratio_T = (logp_T - old_T).exp()
                clipped_T = ratio_T.clamp(1 - clip_eps, 1 + clip_eps)
                kl_T = (ref_T - logp_T).exp() - (ref_T - logp_T) - 1  # Eq. 4
                gain_T = torch.minimum(ratio_T * advantage, clipped_T * advantage)
                objective = (gain_T - kl_coef * kl_T).mean() / len(batch)  # Eq. 3
                (-objective).backward()
            grads = [parameter.grad for parameter in policy.parameters()]
            norm = torch.nn.utils.get_total_norm(grads)
            for grad in grads:
                grad.mul_(min(1.0, MAX_GRAD_NORM / norm))
            optimizer.step()  # l.11
        yield sum(all_rewards) / len(all_rewards)


def main() -> None:
    """Train a model of random weights to count on from a digit; print its reward."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    policy = Transformer(ModelConfig(11, 2, 32, 4, 4, 64, max_context=8))
    policy.init_weights(args.seed)
    right = [[(d + i) % 10 for i in (1, 2, 3)] + [10] for d in range(10)]  # 10: the end

    def reward(digit: int, output: list[int]) -> float:
        return sum(a == b for a, b in zip(output, right[digit])) / 4

    print("Count on from a digit: 7 -> 8 9 0 end. Reward: the share of places that are right.")
    steps = train(
        policy, [[d] for d in range(10)], reward, eos_ids=[10], max_new_tokens=4, batch_size=10,
        group_size=16, num_steps=args.num_steps, lr=1e-2, seed=args.seed,
    )  # fmt: skip
    for step, mean in enumerate(steps):
        if step % 5 == 0 or step + 1 == args.num_steps:
            print(f"step {step:3d}  mean reward {mean:.3f}  {'#' * round(40 * mean)}")


if __name__ == "__main__":
    main()
