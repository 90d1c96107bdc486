"""
Time of a PPO iteration: ppo.py, ppo.py without the KV cache, and TRL's PPOTrainer. They take turns
in one run, and the results are printed as ratios too, because absolute times depend on the machine.

All train the same model: 4 layers, 128 wide, random weights. An iteration has 256 responses and two
epochs of minibatches of 64. Prompts have about 25 tokens. Responses have 32 tokens, because the
model never generates the end token. All use the dtype that ppo.py chooses: bfloat16, which is also
TRL's default, where the CPU supports it, and float32 elsewhere.

    taskset -c 1 python tests/bench_ppo.py                       one core, without TRL
    taskset -c 1 python tests/bench_ppo.py --trl=PYTHON          with TRL; PYTHON is the interpreter
                                                                 of an environment that has it
    taskset -c 1 python tests/bench_ppo.py --dtype=float32       or bfloat16

Such an environment: python -m venv FOLDER; FOLDER/bin/pip install trl==1.9.2 (later releases have
no PPO).

ppo.py's default, a shared trunk, has less to compute than TRL, whose critic is always a second
model; --separate_critic=True is the fair comparison and is measured too. In 'short responses', the
responses end after 10 tokens on average. TRL then still generates and trains on 32 tokens and masks
those after the end. Ratios are those of the shortest times of several iterations. They need a quiet
machine; on a busy one, everything takes about ten minutes.
"""
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROUNDS = 2
ITERATIONS = 3                        # per process; the first one is not counted
BATCH = 256
MINIBATCH = 64
EPOCHS = 2
N_NEW = 32
RATE = 3e-6
FLAGS = dict(block_size=256, n_layer=4, n_head=4, n_embd=128, tie_weights=False)


# -----------------------------------------------------------------------------
# What all of them read


def write_prompts(folder, tok):
    """Write random prompts, as text for ppo.py and as token ids for TRL."""
    from sample import prompt_ids
    random_numbers = random.Random(0)
    for split, count in (('train', BATCH * ITERATIONS), ('val', 8)):
        path = os.path.join(folder, f'prompts_{split}.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            for _ in range(count):
                length = random_numbers.randint(17, 27)
                prompt = ''.join(random_numbers.choices('abcdefghij ', k=length))
                row = {'prompt': prompt, 'response': '',
                       'ids': prompt_ids([{'role': 'user', 'content': prompt}], tok)}
                f.write(json.dumps(row) + '\n')


def write_policy(folder, tok, end_bias):
    """
    Write a policy of random weights in Hugging Face's format. The logit of the end token gets the
    bias 11 * end_bias, which sets how often responses end.
    """
    import torch
    from bpe import SPECIAL_TOKENS
    from data.pretrained import save_pretrained
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **FLAGS))
    special = [tok.special[token] for token in SPECIAL_TOKENS]
    with torch.no_grad():
        # The head has no bias, so channel 0 serves as one: it is about 11 after the last norm.
        model.wte.weight[:, 0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[special, 0] = -2
        model.lm_head.weight[tok.special['<|end|>'], 0] = end_bias
    save_pretrained(model, folder, tok)


def write_inputs(folder):
    """Write the prompts, two policies and a reward model."""
    from bpe import Tokenizer
    from configurator import save_checkpoint
    from model import GPT, GPTConfig, RewardModel
    tok = Tokenizer.byte()
    write_prompts(folder, tok)
    # A bias of -22 never ends; the other one ends about once in 8 tokens.
    write_policy(os.path.join(folder, 'endless'), tok, -2.0)
    write_policy(os.path.join(folder, 'ending'), tok, math.log(256 / 7) / 11)
    flags = {'vocab_size': tok.vocab_size, **FLAGS}
    reward_model = RewardModel(GPT(GPTConfig(**flags)))
    save_checkpoint(os.path.join(folder, 'reward'), {
        'stage': 'reward', 'step': 0, 'model': reward_model.state_dict(), 'model_args': flags,
        'optimizer': [], 'config': {}, 'tokenizer': tok.to_dict()})


# -----------------------------------------------------------------------------
# One run of each


def run(*command):
    """Run a command; returns its last line of output."""
    env = {'OMP_NUM_THREADS': '1', **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout.splitlines()[-1]


def run_ours(folder, dtype, policy='endless', **settings):
    """Run ppo.py: (seconds, share of the rollout, tokens per response) of each iteration."""
    out_dir = os.path.join(folder, 'out')
    settings = dict(
        dataset=folder, init_from=os.path.join(folder, policy),
        reward_model=os.path.join(folder, 'reward'), out_dir=out_dir, batch_size=BATCH,
        minibatch_size=MINIBATCH, ppo_epochs=EPOCHS, max_new_tokens=N_NEW, max_iters=ITERATIONS,
        learning_rate=RATE, critic_lr=RATE, gain_lr=RATE, kl_stop=0, eval_interval=1000,
        eval_prompts=1, test_prompts=1, test_draws=1, device='cpu', dtype=dtype, compile=False,
        **settings)
    args = [f'--{key}={value}' for key, value in settings.items()]
    run(sys.executable, os.path.join(ROOT, 'ppo.py'), *args)
    iterations = []
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        for line in f:
            record = json.loads(line)
            if record.get('step', 0) > 0 and 'rollout_share' in record:
                assert record['updates'] == EPOCHS * BATCH // MINIBATCH, record
                seconds = BATCH / record['episodes_per_second']
                iterations.append((seconds, record['rollout_share'], record['response_length']))
    return iterations


def run_trl(python, folder, dtype, policy='endless'):
    """Run train_trl() in another Python: (seconds, nan, nan) of each iteration."""
    return json.loads(run(python, os.path.abspath(__file__), 'trl', dtype, folder, policy))


def train_trl(dtype, folder, policy):
    """
    Train with TRL and print the seconds of its iterations as JSON. Gradient checkpointing, which it
    uses by default and which would slow it down here, is off, and no batch is split further than
    ours.
    """
    import torch
    from datasets import Dataset
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              AutoTokenizer, TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    source = os.path.join(folder, policy)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    # 1. Two language models (policy and reference) and two scalar models (reward and value).
    language = AutoModelForCausalLM.from_pretrained
    scalar = AutoModelForSequenceClassification.from_pretrained
    policy_model = language(source, dtype=torch.float32)
    reference = language(source, dtype=torch.float32)
    reward_model = scalar(source, num_labels=1, dtype=torch.float32)
    value_model = scalar(source, num_labels=1, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(source, padding_side='left')
    rows = []
    with open(os.path.join(folder, 'prompts_train.jsonl'), encoding='utf-8') as f:
        for line in f:
            rows.append({'input_ids': json.loads(line)['ids']})
    prompts = Dataset.from_list(rows)

    # 2. With gradient_accumulation_steps 1, TRL makes one optimizer step per minibatch, as we do.
    config = PPOConfig(
        output_dir=os.path.join(folder, 'trl'), per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1, num_mini_batches=BATCH // MINIBATCH,
        local_rollout_forward_batch_size=BATCH, num_ppo_epochs=EPOCHS,
        total_episodes=BATCH * ITERATIONS, response_length=N_NEW, temperature=1.0,
        learning_rate=RATE, gradient_checkpointing=False, bf16=dtype == 'bfloat16', use_cpu=True,
        num_sample_generations=0, report_to='none', save_strategy='no',
        stop_token_id=tok.convert_tokens_to_ids('<|end|>'))
    trainer = PPOTrainer(config, tok, policy_model, reference, reward_model, prompts, value_model,
                         eval_dataset=prompts, callbacks=[Clock()])
    trainer.train()
    iterations = []
    for start, end in zip(ends, ends[1:]):
        iterations.append([end - start, math.nan, math.nan])
    print(json.dumps(iterations))


# -----------------------------------------------------------------------------
# The comparison


def measure(python, dtype):
    """{name: (seconds, share of the rollout, tokens per response)} of the fastest iterations."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder)
        calls = {
            'ours': lambda: run_ours(folder, dtype),
            'no cache': lambda: run_ours(folder, dtype, use_cache=False),
            'separate critic': lambda: run_ours(folder, dtype, separate_critic=True),
            'short responses': lambda: run_ours(folder, dtype, 'ending')}
        if python:
            calls['TRL'] = lambda: run_trl(python, folder, dtype)
            calls['TRL, short'] = lambda: run_trl(python, folder, dtype, 'ending')
        iterations = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                iterations[name] += call()
    # Other work on the machine can only add time, so the shortest one counts.
    return {name: min(measured) for name, measured in iterations.items()}


def print_results(best):
    """Print the times and ratios that measure() returned."""
    for name, (seconds, rollout_share, length) in best.items():
        line = f'{name:>15}: {seconds:6.2f} s per iteration, {BATCH / seconds:6.1f} episodes/s'
        if not math.isnan(rollout_share):
            line += f', rollout {rollout_share:4.0%} of it, {length:4.1f} tokens per response'
        print(line)
    pairs = [('no cache', 'ours')]
    if 'TRL' in best:
        pairs += [('TRL', 'ours'), ('TRL', 'separate critic'), ('TRL, short', 'short responses')]
    for slow, fast in pairs:
        print(f'{slow} / {fast} {best[slow][0] / best[fast][0]:.2f}')
    if 'TRL' not in best:
        print('for TRL, give --trl=PYTHON (see the top of this file)')


def main():
    sys.path.insert(0, ROOT)
    from configurator import has_fast_bfloat16
    python = ''
    dtype = 'bfloat16' if has_fast_bfloat16('cpu') else 'float32'
    for word in sys.argv[1:]:
        name, _, value = word.partition('=')
        if name == '--trl':
            python = value
        elif name == '--dtype':
            dtype = value
        else:
            sys.exit(f'error: {word}: the arguments are --trl=PYTHON and --dtype=NAME')
    print(dtype)
    print_results(measure(python, dtype))


if __name__ == '__main__':
    if sys.argv[1:2] == ['trl']:
        train_trl(*sys.argv[2:])
    else:
        main()
