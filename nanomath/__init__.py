"""nanomath: DeepSeekMath (arXiv:2402.03300), from web pages to a policy trained by GRPO.

Shapes. Tensors carry their axes as a suffix, `hidden_BTD`:

    B  rows of a micro-batch        D  model width
    P  prompts (questions)          H  query heads
    G  outputs per prompt           K  key and value heads
    T  time                         E  head width
    V  vocabulary                   F  feed-forward width
    N  flattened tokens             R  rows being sampled, or packed

Time alignment, everywhere: `logp_BT[:, t]` scores `tokens_BT[:, t + 1]`.

Read in this order (the order of the paper, then down into each part):

    speedrun.sh        the story: every stage is a command
    train_grpo.py      Algorithm 1; settings.py: its settings and presets
    advantages.py      rewards -> advantage and weight of each output (Sec. 4.1.2, Eq. 3)
    grpo.py            the objective (Eq. 3, 4), the update
    ../kernels/        the loss over the vocabulary: reference.py first, then the fused forms
    stream.py         groups of outputs, as a stream
    scheduler.py           what is being sampled: admit, step, collect; draw.py chooses a token
    cache.py           keys and values: a prompt's once for its group
    model.py           the Transformer
    rewards.py         what an output is worth; workers.py: functions of your own
    tasks/countdown.py    Countdown's problems and judge; judge/equation.py: its equations;
                          tasks/expressions.py: all its solutions
    tasks/benchmarks.py   GSM8K, MATH, CMATH, ... and your own questions and answers
    judge/answers.py   is this answer right? exact.py: exact numbers; tokens.py, reader.py: LaTeX
    optim.py, data.py  one weighted step; packed examples and token shards (files.py reads lines)
    corpus/            Sec. 2.1: pages, classifier, domains, decontamination, recall (the loop);
                       ../compare_corpora.py: Table 1
    tokenizer.py       byte-level BPE (foreign.py: its file, in Hugging Face's layout)
    chat.py            how a prompt becomes ids: plain, or a chat model's turns
    download.py        models and data sets: the only file that opens connections
    hf.py              Hugging Face folders, in and out; hf_config.py: their config.json
    evaluation.py      Pass@K, Maj@K, intervals; report.py puts a whole run on one page
    metrics.py         what a run of GRPO shows: metrics, samples, plots
    loop.py             what every trainer owes its users: resume, log, checkpoint, stop
    dist.py            processes, FSDP2; activations.py: what blocks recompute, and torch.compile
    checkpoint.py      save and resume; lock.py: one trainer per run; guard.py: ending together
    config.py, log.py  command lines; what a run writes
    plan.py            memory, FLOPs, time, traffic: does it fit, what will it cost

Imports run one way: kernels -> config, dist, failures, lock, log, tokenizer, chat, judge, corpus
-> model, data, optim -> cache, draw, batch, sampler, checkpoint, rewards, tasks
-> grpo, evaluation, run -> monitor -> the scripts. This file imports nothing.
"""
