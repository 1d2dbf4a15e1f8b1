"""From surveys to trained gates: the stages that experiments share."""
