package main

import (
	"os"

	"golang.org/x/term"
)

// A screen is the terminal that m3o runs in, as far as a program somewhere
// else needs to have it as its own.
type screen interface {
	// raw hands every key through unchanged until restore is called.
	raw() (restore func(), err error)
	// size is 0, 0 where nobody knows.
	size() (columns, rows int)
	// resized gets a value when the size may have changed, until stop is called.
	resized() (changes <-chan os.Signal, stop func())
}

type stdScreen struct{}

func (stdScreen) raw() (restore func(), err error) {
	fd := int(os.Stdin.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, err
	}
	return func() { _ = term.Restore(fd, old) }, nil
}

func (stdScreen) size() (columns, rows int) {
	columns, rows, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil {
		return 0, 0
	}
	return columns, rows
}
