"""
How long an iteration of PPO takes: ppo.py, the same without the KV cache, and TRL's PPOTrainer, by turns in one run, as
ratios (absolute times mean little). All train one model: 4 layers, 128 wide, random weights; 256 answers an iteration,
2 epochs of minibatches of 64; prompts of 25 tokens or so, and answers of 32, for the end is never said. All in one
precision, that which ppo.py takes by itself: bfloat16, TRL's default too, where the CPU multiplies in it, else float32.

    taskset -c 1 python tests/bench_ppo.py                       one core; without TRL
    taskset -c 1 python tests/bench_ppo.py --trl=PYTHON          PYTHON: that of an environment that has TRL, made by
        python -m venv FOLDER; FOLDER/bin/pip install trl==1.9.2     (whose releases after that one dropped PPO)
    taskset -c 1 python tests/bench_ppo.py --dtype=float32       or bfloat16

A shared trunk, ppo.py's default, has less to compute than TRL's critic, which is always a second model: beside it stands
the like of that, --separate_critic=True. 'short answers' end by themselves, after 10 tokens on average: TRL generates 32
all the same, trains on them, and masks what follows the end. A ratio is of the least times of some iterations each, so it
wants a quiet machine; all of it takes ten minutes where that is busy.
"""
import json, math, os, random, subprocess, sys, tempfile, time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROUNDS, ITERATIONS = 2, 3                                             # the first iteration of a process does not count
BATCH, MINIBATCH, EPOCHS, N_NEW, RATE = 256, 64, 2, 32, 3e-6

def make(folder):
    """What all sides read: prompts; two policies, of which one never ends its answers; a reward model."""
    import torch
    from bpe import SPECIAL, Tokenizer
    from configurator import save_checkpoint
    from data.answers import prompt_ids
    from model import GPT, GPTConfig, RewardModel
    draw, tok = random.Random(0), Tokenizer.byte()
    text = lambda: ''.join(draw.choices('abcdefghij ', k=draw.randint(17, 27)))
    for split, n in (('train', BATCH * ITERATIONS), ('val', 8)):
        rows = [{'prompt': prompt, 'response': '', 'ids': prompt_ids(prompt, tok)} for prompt in (text() for _ in range(n))]
        with open(os.path.join(folder, f'prompts_{split}.jsonl'), 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
    flags = dict(vocab_size=tok.vocab_size, block_size=256, n_layer=4, n_head=4, n_embd=128, tie_weights=False)
    for name, bias in (('endless', -2.0), ('ending', math.log(256 / 7) / 11)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**flags))
        with torch.no_grad():  # channel 0 stays on, at 11 after the last norm, so that the head has a bias
            model.wte.weight[:, 0] = 1
            model.lm_head.weight[:, 0] = 0
            model.lm_head.weight[[tok.special[token] for token in SPECIAL], 0] = -2
            model.lm_head.weight[tok.special['<|end|>'], 0] = bias    # 11 * bias: about once in 8 tokens, or never
        model.save_pretrained(os.path.join(folder, name), tok)
    save_checkpoint(os.path.join(folder, 'reward'), {
        'stage': 'reward', 'step': 0, 'model': RewardModel(GPT(GPTConfig(**flags))).state_dict(), 'model_args': flags,
        'optimizer': [], 'config': {}, 'tokenizer': tok.to_dict()})

def ours(folder, policy='endless', **settings):
    """Seconds of iterations of ppo.py, the share of them that rollouts take, tokens an answer."""
    settings = dict(
        dataset=folder, init_from=os.path.join(folder, policy), reward_model=os.path.join(folder, 'reward'),
        out_dir=os.path.join(folder, 'out'), batch_size=BATCH, minibatch_size=MINIBATCH, ppo_epochs=EPOCHS,
        max_new_tokens=N_NEW, max_iters=ITERATIONS, learning_rate=RATE, critic_lr=RATE, gain_lr=RATE, kl_stop=0,
        eval_interval=1000, eval_prompts=1, test_prompts=1, test_draws=1, device='cpu', dtype=dtype, compile=False) | settings
    run(sys.executable, os.path.join(ROOT, 'ppo.py'), *(f'--{key}={value}' for key, value in settings.items()))
    with open(os.path.join(folder, 'out', 'log.jsonl'), encoding='utf-8') as f:
        records = [r for r in map(json.loads, f) if r.get('step', 0) > 0 and 'rollout_share' in r]
    assert all(r['updates'] == EPOCHS * BATCH // MINIBATCH for r in records), records
    return [(BATCH / r['episodes_per_second'], r['rollout_share'], r['response_length']) for r in records]

def run(*command):
    """Its last line of output."""
    done = subprocess.run(command, capture_output=True, text=True, env={'OMP_NUM_THREADS': '1'} | os.environ)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout.splitlines()[-1]

def trl(dtype, folder, policy='endless'):
    """In the other Python: print the seconds of TRL's iterations. What it does by default and would slow it down here
    is off, gradient checkpointing; and no batch is cut into more parts than ours."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    source, clock = os.path.join(folder, policy), []
    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())
    tok = AutoTokenizer.from_pretrained(source, padding_side='left')
    language = lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    with open(os.path.join(folder, 'prompts_train.jsonl'), encoding='utf-8') as f:
        prompts = Dataset.from_list([{'input_ids': json.loads(line)['ids']} for line in f])
    # it steps once in gradient_accumulation_steps minibatches, so that must be 1 for a step at each of them
    config = PPOConfig(
        output_dir=os.path.join(folder, 'trl'), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        num_mini_batches=BATCH // MINIBATCH, local_rollout_forward_batch_size=BATCH, num_ppo_epochs=EPOCHS,
        total_episodes=BATCH * ITERATIONS, response_length=N_NEW, temperature=1.0, learning_rate=RATE,
        gradient_checkpointing=False, bf16=dtype == 'bfloat16', use_cpu=True, num_sample_generations=0, report_to='none',
        save_strategy='no', stop_token_id=tok.convert_tokens_to_ids('<|end|>'))
    PPOTrainer(config, tok, language(), language(), scalar(),
               prompts, scalar(), eval_dataset=prompts, callbacks=[Clock()]).train()
    print(json.dumps([[b - a, math.nan, math.nan] for a, b in zip(clock, clock[1:])]))

if __name__ == '__main__':
    if sys.argv[1:2] == ['trl']:
        sys.exit(trl(*sys.argv[2:]))
    sys.path.insert(0, ROOT)
    from model import BF16_CPU
    given = dict(word.removeprefix('--').split('=', 1) for word in sys.argv[1:])
    python, dtype = given.get('trl', ''), given.get('dtype', 'bfloat16' if BF16_CPU else 'float32')
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        sides = {'ours': lambda: ours(folder), 'no cache': lambda: ours(folder, use_cache=False),
                 'separate critic': lambda: ours(folder, separate_critic=True),
                 'short answers': lambda: ours(folder, 'ending')}
        if python:
            sides['TRL'] = lambda: json.loads(run(python, os.path.abspath(__file__), 'trl', dtype, folder))
            sides['TRL, short'] = lambda: json.loads(run(python, os.path.abspath(__file__), 'trl', dtype, folder, 'ending'))
        found = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                found[name] += side()
    print(dtype)
    best = {name: min(seen) for name, seen in found.items()}          # the least time, for noise only ever adds
    for name, (seconds, share, length) in best.items():
        told = '' if math.isnan(share) else f', rollout {share:4.0%} of it, {length:4.1f} tokens an answer'
        print(f'{name:>15}: {seconds:6.2f} s an iteration, {BATCH / seconds:6.1f} episodes/s{told}')
    ratio = lambda a, b: f'{a} / {b} {best[a][0] / best[b][0]:.2f}'
    print(ratio('no cache', 'ours'), *([ratio('TRL', 'ours'), ratio('TRL', 'separate critic'),
                                        ratio('TRL, short', 'short answers')] if python else
                                       ['for TRL, give --trl=PYTHON (see the top of this file)']), sep=', ')
