# A reward model of 400 pairs only, learned by heart, for hacking.py to exploit.
# python reward.py config/wordplay/reward_few.py
#
# Result: all 400 right, and 0.57 of held-out pairs, in a minute: a judge that is easily fooled.

out_dir = 'out/reward_few'
max_pairs = 400
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 300
eval_interval = 100
denoise_weight = 0.0
