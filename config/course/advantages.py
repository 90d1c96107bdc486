# Three baselines for one policy gradient: a critic's value of each token (GAE, arXiv 1506.02438); the mean score of the
# other answers to the prompt (RLOO, 2402.14740); the mean of all, over their spread (GRPO, 2402.03300). All see as many
# answers an iteration; the last two see a quarter of the prompts, four times each, and train no critic.
# for a in gae rloo grpo; do python ppo.py config/wordplay/ppo.py config/course/advantages.py --adv=$a --out_dir=out/adv_$a; done
# python configurator.py out/adv_gae out/adv_rloo out/adv_grpo --metrics=objective/gold,objective/score,objective/kl_exact
#
# Needs out/sft and out/reward, of config/wordplay/sft.py and reward.py.
# Result: right by sampling 0.650 before; then 0.920 at 0.313 nats an answer with the critic, 0.918 at 0.298 with RLOO, 0.914 at
# 0.309 with GRPO; after 60 iterations (config/wordplay) they have 0.935, 0.940 and 0.940. Two to four minutes each on one core.

max_iters = 40
eval_interval = 20
test_prompts = 500
