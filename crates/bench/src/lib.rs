//! Workloads, measurement, statistics, doubts and reports
