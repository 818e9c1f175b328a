"""What maintainers run: the lock, Colab's images, the regression, planted faults, and runs on other machines."""
