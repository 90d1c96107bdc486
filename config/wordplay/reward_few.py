# A reward model trained on only 400 pairs, until it has memorised them. config/wordplay/hacking.py
# shows what PPO does with it.
#
#     python reward.py config/wordplay/reward_few.py
#
# Result, in a minute: accuracy 1.00 on its 400 pairs, 0.57 on held-out pairs.

out_dir = 'out/reward_few'
max_pairs = 400
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 300
eval_interval = 100
denoise_weight = 0.0
