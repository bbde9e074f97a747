package program

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// size is the size of the terminal on stdin.
func size() string {
	ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%dx%d", ws.Col, ws.Row)
}
