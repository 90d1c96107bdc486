"""A reward that a program can verify, for --reward=data/sums/reward.py:correct_sum."""
import re


def correct_sum(prompt, response):
    """1.0 if the last number of the response is the sum of the numbers of the prompt, else 0.0."""
    terms = re.findall('[0-9]+', prompt)
    numbers = re.findall('[0-9]+', response)
    correct = str(sum(int(term) for term in terms))
    return float(numbers[-1:] == [correct])
