# GRPO of SmolLM2 with a reward that a program can verify: the last number of the response is the
# sum. It starts from the published model, without SFT.
#
#     python ppo.py config/smollm2/grpo.py
#
# Result on 27 held-out sums, before -> after:
#
#     greedy responses that are correct      0.11 -> 1.00
#     sampled responses that are correct     0.04 -> 1.00
#     responses that end within 24 tokens    0.19 -> 1.00
#     KL, nats per response                  6.7
#
# 14 minutes of processor time on a CPU with AVX-512 and bfloat16, 6.0 GB of memory.

out_dir = 'out/smollm2-grpo'
init_from = 'out/smollm2'
dataset = 'sums'
reward = 'data/sums/reward.py:correct_sum'
missing_end_score = -1.0         # a response without an end is worse than a wrong one, which has 0
adv = 'grpo'
group_size = 8
kl_coef = 0.02
batch_size = 32                  # 4 prompts, 8 responses each
minibatch_size = 32
gradient_accumulation_steps = 2  # 16 responses per forward pass, to save memory
max_new_tokens = 24
learning_rate = 3e-5             # with 8e-5 the share of correct responses went up and down
gain_lr = 3e-5                   # a published model needs no extra rate for its final norm
max_iters = 40
warmup_iters = 2
eval_interval = 20
eval_prompts = 27
test_draws = 1
compile = False                  # compiling 30 layers took minutes
