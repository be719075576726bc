"""What rollout and learner must agree on. Imports neither `actors` nor `learner`."""
