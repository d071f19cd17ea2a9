"""nanomath: DeepSeekMath (arXiv:2402.03300) at small scale, from web pages to a policy by GRPO.

Shapes. Tensors carry their axes as a suffix, `hidden_BTD`:

    B  rows of a micro-batch        D  model width
    P  prompts (questions)          H  query heads
    G  outputs per prompt           K  key and value heads
    T  time                         E  head width
    V  vocabulary                   F  feed-forward width
    N  flattened tokens             R  rows being sampled, or packed
    S  time of the keys             M  rows of N that are kept

Time alignment, everywhere: `logp_BT[:, t]` scores `tokens_BT[:, t + 1]`.

Read in this order; docs/tour.md goes the same way in evenings, with exercises.

The core: flat files, ../kernels/ and the trainers.

    algorithm1.py         GRPO whole on one page: `python -m nanomath.algorithm1`
    ../kernels/           the loss over the vocabulary: reference.py, the math; then rows.py,
                          policy_loss*.py and linear.py, the fast forms
    advantages.py         rewards -> advantage and weight of each output (Sec. 4.1.2, Eq. 3)
    grpo.py               the objective (Eq. 3, 4) on a batch, the policy update
    ../train_grpo.py      Algorithm 1 with what a real run needs; settings.py: its flags
    model.py              the Transformer; `visible` says who sees whom
    sampler.py            groups of outputs, plainly; rollouts.py: what comes out of it
    draw.py               a token from its logits; randomness by counters
    rewards.py            what an output is worth
    optim.py, data.py     one weighted step; token shards and packed examples
    dist.py               processes, FSDP2; activations.py: what blocks recompute
    ../train_pretrain.py, ../train_sft.py         Sec. 2.2, 2.3 and 3

The wings, by interest: each has its own first page in its __init__.py.

    engine/     the fast sampler: the same tokens as sampler.py
    judge/      is this answer right? exact values, never by evaluating a text
    tasks/      Countdown, benchmarks, workers for reward functions of your own
    text/       tokenizers, chat templates
    corpus/     Sec. 2.1: pages, classifier, domains, decontamination, recall (the loop)
    hub/        Hugging Face folders, in and out; download.py is all that opens connections
    run/        what a trainer owes its users: resume, log, checkpoint, stop
    measure/    Pass@K, Maj@K, intervals; a run on one page; Table 1; the planner
    play/       commands to look at a model and to export it
    base/       command lines from dataclasses, files, logs

Imports run down the floors: kernels, base, judge < text < tasks < corpus and the core < engine, hub
< run < measure, play < the scripts. tests/test_layout.py holds this. This file imports nothing.
"""
