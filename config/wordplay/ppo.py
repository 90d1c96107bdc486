# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
