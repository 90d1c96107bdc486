# Staying near the start: a KL penalty of fixed weight, one that is steered to kl_target nats an answer (arXiv 1909.08593,
# section 2.2), and none, where the score may rise while what it stands for, gold, no longer does (arXiv 2210.10760).
# for k in fixed adaptive none; do python ppo.py config/wordplay/ppo.py config/course/kl_control.py --kl_control=$k --out_dir=out/kl_$k; done
# python configurator.py out/kl_fixed out/kl_adaptive out/kl_none \
#   --metrics=objective/kl_exact,objective/score,objective/gold,objective/kl_coef
#
# Needs out/sft and out/reward, of config/wordplay/sft.py and reward.py.
# Result: right by sampling 0.635 before, then 0.918 at 0.358 nats an answer with the fixed weight, 0.921 at 0.374 with the steered
# one (which fell from 0.10 to 0.07, for 0.4 nats were never reached), 0.920 at 0.389 with none, and greedily 0.986 before, then
# 0.976, 0.978 and 0.968: hardly a difference. With so good a judge 40 iterations need no penalty; config/wordplay/hacking.py has a
# bad one. Two to three minutes each on one core of the 2-core CPU with AVX-512.

max_iters = 40
eval_interval = 20
test_prompts = 500
