//go:build linux

package oci_test

func daemon() {}
