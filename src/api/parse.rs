//! CRD -> DesiredCluster: parse, do not validate.
