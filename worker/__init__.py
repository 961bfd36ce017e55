"""What runs jobs: the Celery task, the loop from claim to result, heartbeat, reconciler."""
