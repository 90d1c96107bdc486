# A reward model of 400 pairs only, for hacking.py to exploit.
# python reward.py config/wordplay/reward_few.py
#
# Result: accuracy on clean labels 0.55, a judge that is easily fooled.

out_dir = 'out/reward_few'
max_pairs = 400
max_iters = 40
eval_interval = 40
