# DPO on the 400 pairs of config/wordplay/reward_few.py: it trains the policy itself, without a
# reward model.
#
#     for n in 10 25 100 300; do
#         python reward.py config/course/dpo_few.py --max_iters=$n --out_dir=out/dpo_$n
#     done
#
# It needs out/sft, made with config/wordplay/sft.py. Chapter 8.3 compares it with PPO.
#
# Result after 10, 25, 100 and 300 steps, as a share of the 2,000 test pairs on which policy and
# clean labels agree: 0.604, 0.662, 0.691, 0.713. Its responses get worse meanwhile, see the
# chapter.

out_dir = 'out/dpo_few'
loss = 'dpo'
causal = True
max_pairs = 400
batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 1e-4
muon_lr = 1e-3
eval_interval = 100
