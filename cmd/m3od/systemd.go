package main

import (
	"fmt"
	"net"
	"os"
)

// notifySystemd tells the service manager a state, as sd_notify(3) does. It
// does nothing where no manager asked to be told.
func notifySystemd(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("dial service manager: %w", err)
	}
	defer c.Close() //nolint:errcheck // nothing is buffered
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("write to service manager: %w", err)
	}
	return nil
}
