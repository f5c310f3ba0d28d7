"""What an answer is: refusal, compliance, gibberish or none of them; by phrases, look-up, a classifier or an endpoint."""
