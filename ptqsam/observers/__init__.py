"""Observers: statistics of tensors -> scale and zero point. One file per family."""

from ptqsam.observers.base import Observer
from ptqsam.observers.minmax import AvgMinMax, MinMax
from ptqsam.observers.mse import MSE, AvgMSE, AvgMSEFast, MSEFast
from ptqsam.observers.percentile import Percentile

__all__ = ['MSE', 'AvgMSE', 'AvgMSEFast', 'AvgMinMax', 'MSEFast', 'MinMax', 'Observer', 'Percentile']
