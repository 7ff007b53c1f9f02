"""The zoo: small random-weight models of many kinds, each partitioned under many plans and compared with the single device."""
