"""Probe heads that OpenMMLab does not have. Importing a module registers its heads with mmseg."""
