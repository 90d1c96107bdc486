# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
