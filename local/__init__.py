"""AWS on one machine: ministack with a real SageMaker added, and the application deployed into it."""
