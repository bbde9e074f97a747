package protobuf

import (
	"sync"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/genproto/googleapis/api/configchange"
	"google.golang.org/genproto/googleapis/api/distribution"
	"google.golang.org/genproto/googleapis/api/error_reason"
	"google.golang.org/genproto/googleapis/api/httpbody"
	"google.golang.org/genproto/googleapis/api/label"
	"google.golang.org/genproto/googleapis/api/metric"
	"google.golang.org/genproto/googleapis/api/monitoredres"
	"google.golang.org/genproto/googleapis/api/serviceconfig"
	"google.golang.org/genproto/googleapis/api/visibility"
	"google.golang.org/genproto/googleapis/rpc/code"
	attribute "google.golang.org/genproto/googleapis/rpc/context/attribute_context"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpchttp "google.golang.org/genproto/googleapis/rpc/http"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/genproto/googleapis/type/calendarperiod"
	"google.golang.org/genproto/googleapis/type/color"
	"google.golang.org/genproto/googleapis/type/date"
	"google.golang.org/genproto/googleapis/type/datetime"
	"google.golang.org/genproto/googleapis/type/dayofweek"
	"google.golang.org/genproto/googleapis/type/decimal"
	"google.golang.org/genproto/googleapis/type/expr"
	"google.golang.org/genproto/googleapis/type/fraction"
	"google.golang.org/genproto/googleapis/type/interval"
	"google.golang.org/genproto/googleapis/type/latlng"
	"google.golang.org/genproto/googleapis/type/localized_text"
	"google.golang.org/genproto/googleapis/type/money"
	"google.golang.org/genproto/googleapis/type/month"
	"google.golang.org/genproto/googleapis/type/phone_number"
	"google.golang.org/genproto/googleapis/type/postaladdress"
	"google.golang.org/genproto/googleapis/type/quaternion"
	"google.golang.org/genproto/googleapis/type/timeofday"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/gofeaturespb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/apipb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/sourcecontextpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/typepb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"google.golang.org/protobuf/types/pluginpb"
)

// wellKnown are the files that come with every protobuf compiler. A copy in
// the tree is passed over: generated code of every language has them built in.
//
// They are listed, not looked up in the process's registry, because that holds
// whatever else the daemon links and would resolve imports that a developer's
// machine does not.
var wellKnown = sync.OnceValue(func() map[string]protoreflect.FileDescriptor {
	return byName(
		descriptorpb.File_google_protobuf_descriptor_proto,
		pluginpb.File_google_protobuf_compiler_plugin_proto,
		gofeaturespb.File_google_protobuf_go_features_proto,
		anypb.File_google_protobuf_any_proto,
		apipb.File_google_protobuf_api_proto,
		durationpb.File_google_protobuf_duration_proto,
		emptypb.File_google_protobuf_empty_proto,
		fieldmaskpb.File_google_protobuf_field_mask_proto,
		sourcecontextpb.File_google_protobuf_source_context_proto,
		structpb.File_google_protobuf_struct_proto,
		timestamppb.File_google_protobuf_timestamp_proto,
		typepb.File_google_protobuf_type_proto,
		wrapperspb.File_google_protobuf_wrappers_proto,
	)
})

// googleapis are Google's common files, used where the tree has no copy of its
// own. They are descriptor protos, not linked descriptors, so that what they
// import is looked up in the tree first, too: two versions of one file would
// declare every symbol twice.
var googleapis = sync.OnceValue(func() map[string]*descriptorpb.FileDescriptorProto {
	all := map[string]*descriptorpb.FileDescriptorProto{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if all[fd.Path()] != nil || wellKnown()[fd.Path()] != nil || fd.IsPlaceholder() {
			return
		}
		all[fd.Path()] = protodesc.ToFileDescriptorProto(fd)
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
	}
	for _, fd := range []protoreflect.FileDescriptor{
		annotations.File_google_api_annotations_proto,
		annotations.File_google_api_client_proto,
		annotations.File_google_api_field_behavior_proto,
		annotations.File_google_api_field_info_proto,
		annotations.File_google_api_http_proto,
		annotations.File_google_api_resource_proto,
		annotations.File_google_api_routing_proto,
		configchange.File_google_api_config_change_proto,
		distribution.File_google_api_distribution_proto,
		error_reason.File_google_api_error_reason_proto,
		httpbody.File_google_api_httpbody_proto,
		label.File_google_api_label_proto,
		metric.File_google_api_metric_proto,
		monitoredres.File_google_api_monitored_resource_proto,
		serviceconfig.File_google_api_auth_proto,
		serviceconfig.File_google_api_service_proto,
		visibility.File_google_api_visibility_proto,
		code.File_google_rpc_code_proto,
		attribute.File_google_rpc_context_attribute_context_proto,
		errdetails.File_google_rpc_error_details_proto,
		rpchttp.File_google_rpc_http_proto,
		status.File_google_rpc_status_proto,
		calendarperiod.File_google_type_calendar_period_proto,
		color.File_google_type_color_proto,
		date.File_google_type_date_proto,
		datetime.File_google_type_datetime_proto,
		dayofweek.File_google_type_dayofweek_proto,
		decimal.File_google_type_decimal_proto,
		expr.File_google_type_expr_proto,
		fraction.File_google_type_fraction_proto,
		interval.File_google_type_interval_proto,
		latlng.File_google_type_latlng_proto,
		localized_text.File_google_type_localized_text_proto,
		money.File_google_type_money_proto,
		month.File_google_type_month_proto,
		phone_number.File_google_type_phone_number_proto,
		postaladdress.File_google_type_postal_address_proto,
		quaternion.File_google_type_quaternion_proto,
		timeofday.File_google_type_timeofday_proto,
	} {
		add(fd)
	}
	return all
})

func byName(fds ...protoreflect.FileDescriptor) map[string]protoreflect.FileDescriptor {
	m := make(map[string]protoreflect.FileDescriptor, len(fds))
	for _, fd := range fds {
		m[fd.Path()] = fd
	}
	return m
}

// linked says whether the import name needs no file in the tree.
func linked(name string) bool {
	return wellKnown()[name] != nil || googleapis()[name] != nil
}
