"""What people are asked to judge: the review queues of the feedback service, filled from its log."""
