package m3o

import (
	"errors"
	"fmt"
)

// Kind says what a caller can do about an error. Kinds, not error values, are
// what packages promise each other.
type Kind int

// The kinds. The zero Kind is Internal: a fault of ours.
const (
	Internal    Kind = iota
	Invalid          // the input is wrong; do not repeat it
	NotFound         // the thing named does not exist
	Conflict         // it exists already, or changed since it was read
	Denied           // who asks may not
	Unavailable      // try again later
)

var kindNames = [...]string{"internal", "invalid", "not found", "conflict", "denied", "unavailable"}

// String is the kind in lower-case words.
func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("kind(%d)", int(k))
	}
	return kindNames[k]
}

// An Error is a failure that reaches a user. Msg says what is wrong, Hint what
// to do or type next; both are shown. Err is for the log only.
type Error struct {
	Kind Kind
	Msg  string
	Hint string
	Err  error
}

// Error is Msg: Err never leaks to a user through it.
func (e *Error) Error() string { return e.Msg }

// Unwrap gives the cause, for errors.Is and for the log.
func (e *Error) Unwrap() error { return e.Err }

// KindOf is the Kind of the first *Error in err's chain, Internal when there is none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// HintOf is the Hint of the first *Error in err's chain, "" when there is none.
func HintOf(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Hint
	}
	return ""
}

// Errorf makes an *Error with no hint. A %w operand becomes its cause.
func Errorf(k Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: k, Msg: err.Error(), Err: errors.Unwrap(err)}
}
