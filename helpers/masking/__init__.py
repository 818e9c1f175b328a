"""Which tokens are trained: proved for every row, shown for one."""

from helpers.masking.check import check_masking
from helpers.masking.view import show_masking
