package daemon

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

// A writer that takes some bytes, as a file does until the disk is full.
type filling struct{ room int }

func (f *filling) Write(p []byte) (int, error) {
	if len(p) > f.room {
		return 0, syscall.ENOSPC
	}
	f.room -= len(p)
	return len(p), nil
}

func TestAFullDiskForTheBuildLogDoesNotBreakThePush(t *testing.T) {
	var pusher strings.Builder
	both := &tee{pusher: &pusher, log: &filling{room: 20}}
	output{both}.step("Building .")
	output{both}.line("a line for which there is no room")
	output{both.logged()}.fail(errors.New("what only the log gets"))
	output{both}.line("last")
	if got, want := pusher.String(), "-----> Building .\n       a line for which there is no room\n       last\n"; got != want {
		t.Errorf("the pusher got %q, want %q", got, want)
	}
}
