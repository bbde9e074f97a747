// Package api holds the contract of the control plane: the .proto files under
// m3o/v1 and the Go code generated from them, committed and never edited.
// It is the only package an outsider may depend on.
package api

//go:generate sh -c "protoc -I . --go_out=. --go_opt=paths=source_relative --connect-go_out=. --connect-go_opt=paths=source_relative m3o/v1/*.proto"
