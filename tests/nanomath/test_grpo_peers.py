"""The objective beside trl's: the same rollouts and weights give the same loss and gradients."""

import pytest
import torch

from kernels import Objective
from nanomath.advantages import outcome_advantages, output_weights
from nanomath.dist import Dist
from nanomath.grpo import METRIC_SUMS, objective_of_rows, response_logprobs
from nanomath.hub.hf import llama_name, load_hf
from nanomath.rollouts import Rollouts, make_batch

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CPU = torch.device("cpu")
ALONE = Dist(0, 0, 1, CPU)
VOCAB, MAX_NEW, TEMPERATURE = 61, 9, 0.9
NORMS = {"grpo": "response", "dapo": "token", "dr_grpo": "constant"}


def make_llama(folder, seed):
    """Write a Llama of random weights; return its folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_trainer(folder, out, **options):
    """Return trl's trainer of the model in `folder`, about to train."""
    trl = pytest.importorskip("trl", reason="needs the extra [peers]")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="2", pad_token="2"
    )
    args = trl.GRPOConfig(
        output_dir=str(out), report_to="none", use_cpu=True, bf16=False, num_generations=3,
        per_device_train_batch_size=6, gradient_accumulation_steps=1, temperature=TEMPERATURE,
        max_completion_length=MAX_NEW, epsilon=0.2, use_bias_correction_kl=False, use_vllm=False,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, **options,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        str(folder), lambda completions, **_: [0.0] * len(completions), args,
        datasets.Dataset.from_list([{"prompt": "3 4"}] * 6), processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, this project's model of it, and of a reference)."""
    folder = make_llama(tmp_path_factory.mktemp("policy"), 0)
    policy, _ = load_hf(folder)
    reference, _ = load_hf(make_llama(tmp_path_factory.mktemp("reference"), 1))
    return folder, policy, reference


def rollouts_and_rewards():
    """Two questions of three outputs; an output of MAX_NEW tokens is truncated."""
    generator = torch.Generator().manual_seed(0)
    lengths_PG = torch.tensor([[3, 9, 5], [7, 1, 9]])
    tokens_PGT = torch.randint(3, VOCAB, (2, 3, MAX_NEW), generator=generator)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (4, 6)]
    logp_PGT = torch.zeros(2, 3, MAX_NEW)
    rollouts = Rollouts(tokens_PGT, lengths_PG, logp_PGT, finished_PG=lengths_PG < MAX_NEW)
    return prompts, rollouts, torch.tensor([[1.0, 0.0, 0.25], [0.0, 2.0, 0.5]])


def trl_inputs(prompts, batch, rollouts, mask_truncated):
    """Lay the same rows out as trl does: prompts padded left, completions right."""
    width = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(3)]
    prompt_ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in rows])
    prompt_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in rows])
    lengths_B = rollouts.lengths_PG.flatten()
    mask_BT = torch.arange(MAX_NEW) < lengths_B[:, None]

    def spread(values_N):
        if values_N is None:
            return None
        return torch.zeros(6, MAX_NEW).masked_scatter(mask_BT, values_N.float())

    kept_BT = mask_BT & (rollouts.finished_PG.flatten()[:, None] | (not mask_truncated))
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": rollouts.tokens_PGT.flatten(0, 1).masked_fill(~mask_BT, 2),
        "completion_mask": kept_BT.int(),
        "advantages": spread(batch.advantages_N)[:, 0],
        "old_per_token_logps": spread(batch.old_logp_N),
        "ref_per_token_logps": spread(batch.ref_logp_N),
        "num_items_in_batch": kept_BT.sum(),
    }


@pytest.mark.parametrize("old", [False, True], ids=["mu=1", "mu>1"])
@pytest.mark.parametrize(
    ("loss_type", "beta", "epsilon_high", "scale_rewards", "mask_truncated"),
    [
        ("grpo", 0.0, None, "group", False),
        ("grpo", 0.04, None, "group", False),
        ("grpo", 0.04, 0.6, "group", True),
        ("dapo", 0.0, 0.6, "group", False),
        ("dapo", 0.04, 0.6, "group", True),
        ("dr_grpo", 0.0, None, "none", False),
        ("dr_grpo", 0.04, 0.6, "none", True),
    ],
)
def test_loss_and_gradients_equal_trl(
    models, tmp_path, old, loss_type, beta, epsilon_high, scale_rewards, mask_truncated
):
    """Loss within 1e-5 and each gradient within 1e-5 of its model's largest, from given advantages
    (trl's std has ddof 1 and an epsilon) and with trl's KL not multiplied by the ratio."""
    folder, policy, reference = models
    prompts, rollouts, rewards_PG = rollouts_and_rewards()
    kind = {"group": "std", "none": "mean"}[scale_rewards]
    advantages_PG = outcome_advantages(rewards_PG, kind)
    weights_PG = output_weights(
        rewards_PG, rollouts, max_new_tokens=MAX_NEW, dist=ALONE, loss_norm=NORMS[loss_type],
        mask_truncated=mask_truncated,
    )  # fmt: skip
    batch = make_batch(prompts, rollouts, advantages_PG, weights_PG, num_prompts=2, world_size=1)
    scoring = {"temperature": TEMPERATURE, "micro_batch_size": 6, "device": CPU}
    batch.ref_logp_N = response_logprobs(reference, batch, **scoring)
    if old:
        logp_N = response_logprobs(policy, batch, **scoring)
        log_ratios = torch.tensor([-0.7, 0.3, -0.05, 0.7, 0.0, -0.29, 0.05])  # 0.3: 1.2 to 1.6
        batch.old_logp_N = logp_N - log_ratios.repeat(len(logp_N))[: len(logp_N)]
    high = 0.2 if epsilon_high is None else epsilon_high
    policy.zero_grad()
    loss, sums, _ = objective_of_rows(
        policy, batch, range(6), Objective(0.2, high, beta, TEMPERATURE), CPU
    )
    loss.backward()
    trainer = make_trainer(
        folder, tmp_path, loss_type=loss_type, beta=beta, epsilon_high=epsilon_high,
        scale_rewards=scale_rewards, mask_truncated_completions=mask_truncated,
    )  # fmt: skip
    theirs = trainer._compute_loss(
        trainer.model, trl_inputs(prompts, batch, rollouts, mask_truncated)
    )
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    largest = max(grad.abs().max() for grad in grads.values())
    assert largest > 0.01
    for name, parameter in policy.named_parameters():
        error = (parameter.grad - grads[llama_name(name)]).abs().max()
        assert error <= 1e-5 * largest, (name, error / largest)
    tokens = int((batch.weights_N > 0).sum())
    for side in ("low", "high"):
        share = trainer._metrics["train"][f"clip_ratio/{side}_mean"][-1]
        ours = sums[METRIC_SUMS.index(f"clip_{side}")].item() / tokens
        assert ours == pytest.approx(share) and (share > 0) == old
