package runtime

import "syscall"

// PassSignals calls send for each of c.Signals until the function it returns
// is called. It is for drivers.
func (c Cmd) PassSignals(send func(syscall.Signal) error) (stop func()) {
	if c.Signals == nil {
		return func() {}
	}
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case sig, ok := <-c.Signals:
				if !ok {
					return
				}
				_ = send(sig) // fails when the command has ended
			case <-end:
				return
			}
		}
	}()
	return func() {
		close(end)
		<-done
	}
}
